import contextlib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tensorfiles import torch_writer as write
from valora_jax.tensorfiles.torch_pickle import PickleReader


def read(pickle: bytes) -> object:
    return PickleReader().read(io.BytesIO(pickle))


@given(st.binary(max_size=200))
def test_random_bytes_are_a_value_or_a_value_error(raw):
    with contextlib.suppress(ValueError):
        read(raw)


# Opcodes that the reader knows, in any order: deeper into the machine than random bytes get.
@given(st.lists(st.sampled_from([b"(", b"}", b"]", b")", b"N", b"J\x01\0\0\0", b"t", b"u", b"s",
    b"e", b"a", b"R", b"b", b"Q", b"q\0", b"h\0", b"\x85", b"0", b"l", b"d",
    write.text("storage"), write.name("collections", "OrderedDict"),
    write.name("torch._utils", "_rebuild_tensor_v2"), write.name("torch", "FloatStorage")]),
    max_size=30))  # fmt: skip
def test_any_order_of_known_opcodes_is_a_value_or_a_value_error(opcodes):
    with contextlib.suppress(ValueError):
        read(b"".join(opcodes) + write.STOP)


def test_consecutive_pickles_are_read_one_by_one():
    stream = io.BytesIO(write.number(5) + b"." + write.text("x") + b".")
    reader = PickleReader()
    assert [reader.read(stream), reader.read(stream)] == [5, "x"]


def test_a_huge_memo_index_or_length_allocates_nothing():
    assert read(b"Nr\xff\xff\xff\xff.") is None
    with pytest.raises(ValueError, match="expected 4294967295 bytes"):
        read(b"X\xff\xff\xff\xffabc.")


def test_a_deeply_nested_key_is_refused_without_being_hashed():
    with pytest.raises(ValueError, match="neither text nor a number"):
        read(b"})" + b"\x85" * 200_000 + b"Ns.")
