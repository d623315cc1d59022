import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from valora_jax.models.weight_map import (
    Entry,
    for_each_layer,
    is_finite,
    mismatches,
    resolve,
    to_hf,
)

DTYPES = [np.dtype(d) for d in (np.float16, ml_dtypes.bfloat16, np.float32)]


def random_bits(shape, dtype, seed=0):
    """Any bit pattern, so that NaN payloads and signed zeros are among them."""
    raw = np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(raw, dtype).reshape(shape)


@given(
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["as_is", "transposed"]),
    widths=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    tail=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_split_undoes_join_bit_for_bit(dtype, layout, widths, tail):
    shapes = {f"part{i}": (width, *tail) for i, width in enumerate(widths)}
    entry = Entry(shapes, "ours", layout)
    parts = {name: random_bits(shape, dtype) for name, shape in shapes.items()}
    joined = entry.join(list(parts.values()), dtype)
    assert joined.shape == entry.shape
    for name, part in entry.split(joined).items():
        assert part.shape == parts[name].shape
        assert part.tobytes() == parts[name].tobytes()


def test_a_fused_kernel_computes_what_its_parts_compute():
    rng = np.random.default_rng(0)
    q_ND, k_KD, x_TD = (rng.normal(size=shape) for shape in [(150, 5), (70, 5), (3, 5)])
    entry = Entry({"q": q_ND.shape, "k": k_KD.shape}, "qk.kernel", "transposed")
    got = x_TD @ entry.join([q_ND, k_KD], np.dtype(np.float64))
    np.testing.assert_allclose(got, np.concatenate([x_TD @ q_ND.T, x_TD @ k_KD.T], axis=1))


def test_a_patch_convolution_becomes_a_matmul_over_flattened_patches():
    rng = np.random.default_rng(0)
    weight, patch = rng.normal(size=(7, 3, 2, 2)), rng.normal(size=(3, 2, 2))
    entry = Entry({"patch_embedding.weight": weight.shape}, "kernel", "transposed")
    got = patch.reshape(-1) @ entry.join([weight], np.dtype(np.float64))
    np.testing.assert_allclose(got, np.einsum("dcij,cij->d", weight, patch))


def test_a_layer_number_is_filled_in_on_both_sides():
    entries = for_each_layer(2, [Entry({"h.{i}.w": (1,)}, "layers.{i}.scale")])
    assert [(list(e.hf), e.ours) for e in entries] == [
        (["h.0.w"], "layers.0.scale"),
        (["h.1.w"], "layers.1.scale"),
    ]


def test_every_mismatch_is_listed():
    entries = [Entry({"a": (2, 3)}, "ours.a"), Entry({"b": (4,), "c": (4,)}, "ours.bc")]
    assert sorted(mismatches(entries, {"a": (3, 2), "b": (4,), "stray": (1,)})) == [
        "a -> ours.a: shape (3, 2), want (2, 3)",
        "in the checkpoint but not in the map: stray",
        "missing from the checkpoint: c",
    ]


class TestTiedHead:
    EMBEDDING = Entry({"embed": (3, 2)}, "embedding")
    HEAD = Entry({"head": (3, 2)}, "head.kernel", "transposed", stand_in="embed")

    def test_it_is_read_from_its_stand_in_when_the_checkpoint_has_none(self):
        _, head = resolve([self.EMBEDDING, self.HEAD], ["embed"])
        assert head == Entry({"embed": (3, 2)}, "head.kernel", "transposed", stand_in="embed")

    def test_its_own_tensor_counts_when_there_is_one(self):
        assert resolve([self.HEAD], ["embed", "head"]) == [self.HEAD]

    def test_a_copy_is_not_written_back(self):
        embedding_VD = np.arange(6, dtype=np.float32).reshape(3, 2)
        ours = {"embedding": embedding_VD, "head.kernel": embedding_VD.T}
        assert [name for name, _ in to_hf([self.HEAD, self.EMBEDDING], ours)] == ["embed"]

    def test_a_head_of_its_own_is_written_back(self):
        embedding_VD = np.arange(6, dtype=np.float32).reshape(3, 2)
        ours = {"embedding": embedding_VD, "head.kernel": embedding_VD.T + 1}
        written = dict(to_hf([self.EMBEDDING, self.HEAD], ours))
        np.testing.assert_array_equal(written["head"], embedding_VD + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf], ids=str)
def test_one_bad_number_anywhere_is_not_finite(dtype, value):
    array = np.full((300, 2), -1.5, dtype)
    array[299, 1] = value
    assert not is_finite(array)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_extremes_of_a_dtype_are_finite(dtype):
    info = ml_dtypes.finfo(dtype)
    assert is_finite(np.array([info.max, info.min, info.smallest_subnormal, -0.0], dtype))
