import pathlib
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tensorfiles import torch_writer as write
from valora_jax.errors import TensorFileError
from valora_jax.tensorfiles import open_tensors

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens" / "adapters"
FORMATS = {"zip": write.zip_bytes, "legacy": write.legacy_bytes}
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int8, np.bool_]
A = write.whole("0", np.arange(6, dtype=np.float32).reshape(2, 3))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("torch") / "file.bin"


def read_all(path, raw: bytes) -> dict[str, np.ndarray]:
    path.write_bytes(raw)
    with open_tensors(path) as file:
        return {name: file.read(name) for name in file.names}


@st.composite
def views(draw):
    data = np.arange(draw(st.integers(1, 40))).astype(draw(st.sampled_from(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    order = draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), 1
    for axis in order:
        strides[axis] = step
        step *= max(shape[axis], 1) + draw(st.integers(0, 1))
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
    room = data.size - 1 - last
    if room < 0:  # a tensor as large as its view needs
        data, room = np.resize(data, last + 1), 0
    offset = draw(st.integers(0, room))
    return write.Tensor(key="", data=data, shape=shape, strides=tuple(strides), offset=offset)


@given(items=st.lists(views(), max_size=4), form=st.sampled_from(list(FORMATS)))
def test_any_strided_view_of_any_dtype_is_read(path, items, form):
    tensors = {
        f"t{i}": write.Tensor(
            key=str(i), data=t.data, shape=t.shape, strides=t.strides, offset=t.offset
        )
        for i, t in enumerate(items)
    }
    got = read_all(path, FORMATS[form](tensors))
    assert list(got) == list(tensors)
    for name, item in tensors.items():
        assert got[name].dtype == item.data.dtype
        assert got[name].flags.c_contiguous
        assert got[name].flags.owndata
        np.testing.assert_array_equal(got[name], item.value())


@pytest.mark.parametrize("form", FORMATS)
def test_two_tensors_may_share_a_storage(path, form):
    row = write.Tensor(key="0", data=A.data, shape=(3,), strides=(1,), offset=3)
    got = read_all(path, FORMATS[form]({"a": A, "row": row}))
    np.testing.assert_array_equal(got["row"], got["a"][1])


def test_a_file_that_torch_wrote_equals_its_safetensors_twin():
    zipped = open_tensors(GOLDENS / "a21_binfile" / "adapter_model.bin")
    plain = open_tensors(GOLDENS / "a12b_qv_r4" / "adapter_model.safetensors")
    assert set(zipped.names) == set(plain.names)
    for name in plain.names:
        assert zipped.shape(name) == plain.shape(name)
        assert zipped.dtype(name) == plain.dtype(name)
        np.testing.assert_array_equal(zipped.read(name), plain.read(name))


def test_parameters_untyped_storages_and_module_versions_are_read(path):
    untyped = write.sequence(
        write.text("storage"),
        write.name("torch.storage", "UntypedStorage"),
        write.text("1"),
        write.text("cpu"),
        write.number(4),
    )
    v3 = write.sequence(
        untyped + b"Q",
        write.number(1),
        write.sequence(write.number(1)),
        write.sequence(write.number(1)),
        b"\x89",
        b"N",
        write.name("torch", "bfloat16"),
    )
    parameter = write.name("torch._utils", "_rebuild_parameter")
    parameter += write.sequence(write.tensor(A), b"\x88", b"N") + b"R"
    ordered = write.name("collections", "OrderedDict") + b")R("
    ordered += write.text("v3") + write.name("torch._utils", "_rebuild_tensor_v3") + v3 + b"R"
    ordered += write.text("p") + parameter + b"u"
    metadata = write.mapping(_metadata=b"}") + b"b"
    pair = np.array([1, 2], ml_dtypes.bfloat16)
    storages = {"0": A.data.tobytes(), "1": pair.tobytes()}
    got = read_all(path, write.archive(write.START + ordered + metadata + b".", storages))
    np.testing.assert_array_equal(got["v3"], pair[1:])
    np.testing.assert_array_equal(got["p"], A.value())


def of(pickle: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    return write.archive(write.START + pickle + write.STOP, storages or {})


def one(**changes) -> bytes:
    fields = dict(key="0", data=A.data, shape=(2, 3), strides=(3, 1), offset=0) | changes
    return write.zip_bytes({"a": write.Tensor(**fields)})


CALL = write.name("posix", "mkdir") + write.sequence(write.text("RAN")) + b"R"
REFUSED = {
    "empty": (b"", "empty"),
    "text": (b"not a tensor file\n", "not a readable torch file"),
    "cut": (write.zip_bytes({"a": A})[:-30], "cut short"),
    "cut_legacy": (write.legacy_bytes({"a": A})[:-5], "past the end"),
    "junk": (write.zip_bytes({"a": A}) + bytes(1024), "followed by other bytes"),
    "junk_legacy": (write.legacy_bytes({"a": A}) + bytes(10), "10 bytes follow"),
    "code": (of(write.mapping(a=CALL)), r"refers to posix\.mkdir"),
    "code_protocol_4": (of(write.text("os") + write.text("system") + b"\x93"), r"os\.system"),
    "builtin": (of(write.name("builtins", "eval")), r"builtins\.eval"),
    "new_object": (of(write.name("collections", "OrderedDict") + b")\x81"), "NEWOBJ"),
    "state": (of(write.mapping(a=b"N") + b"Nb"), "state of an object"),
    "list": (of(b"]"), "holds a list"),
    "not_a_tensor": (of(write.mapping(step=write.number(3))), "'step': int"),
    "no_storage": (of(write.mapping(a=write.tensor(A))), "lacks storage '0'"),
    "short_storage": (of(write.mapping(a=write.tensor(A)), {"0": bytes(8)}), "claims 24 bytes"),
    "huge_shape": (one(shape=(10**9, 10**9)), "does not fit its storage"),
    "expanded": (one(shape=(10**9,), strides=(0,)), "does not fit its storage"),
    "negative": (one(shape=(-2, 3)), "no count"),
    "out_of_range": (one(offset=1), "does not fit its storage"),
    "memo": (of(b"h\x07"), "damaged pickle"),
    "endless": (write.archive(write.START + b"}", {}), "damaged pickle|not a readable"),
    "compressed": (
        write.archive(write.START + b"}.", {}, compression=zipfile.ZIP_DEFLATED),
        "compressed or encrypted",
    ),
}


@pytest.mark.parametrize(("raw", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_file_is_refused_by_name_and_nothing_runs(tmp_path, monkeypatch, raw, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TensorFileError, match=message) as error:
        read_all(tmp_path / "file.bin", raw)
    assert "file.bin" in str(error.value)
    assert not (tmp_path / "RAN").exists()


@given(
    form=st.sampled_from(list(FORMATS)),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_a_damaged_file_is_read_or_refused_and_never_crashes(path, form, changes):
    raw = bytearray(FORMATS[form]({"a": A, "b": write.whole("1", np.ones(3, np.float16))}))
    for position, byte in changes:
        raw[position % len(raw)] = byte
    try:
        read_all(path, bytes(raw))
    except TensorFileError as error:
        assert "file.bin" in str(error)  # noqa: PT017
