import json
import pathlib
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from valora_jax.errors import TensorFileError
from valora_jax.tensorfiles import open_tensors

BAD = pathlib.Path(__file__).parent.parent / "goldens" / "adapters" / "bad"
DAMAGED = [
    "b01_truncated",
    "b02_header_len_huge",
    "b03_empty_file",
    "b04_not_safetensors",
    "b21_overlapping_offsets",
    "b22_offsets_out_of_range",
    "b23_unknown_dtype",
    "b26_huge_shape",
    "b27_negative_shape",
    "b30_size_not_shape",
    "b32_trailing_garbage",
]


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_]
)
def test_shapes_dtypes_and_values_come_back(tmp_path, dtype):
    tensors = {"b": np.arange(6).astype(dtype).reshape(2, 3), "a": np.ones((), dtype)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with open_tensors(tmp_path / "x.safetensors") as file:
        assert set(file.names) == {"a", "b"}
        assert file.metadata == {"format": "pt"}
        for name, array in tensors.items():
            assert (file.shape(name), file.dtype(name)) == (array.shape, array.dtype)
            np.testing.assert_array_equal(file.read(name), array)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_by_name(name):
    with pytest.raises(TensorFileError, match=rf"{name}.adapter_model\.safetensors: "):
        open_tensors(BAD / name / "adapter_model.safetensors")


def test_a_dtype_that_numpy_lacks_is_named(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(TensorFileError, match="tensor 'w' is F8_E4M3, which is not read"):
        open_tensors(path)


@pytest.mark.parametrize(
    ("name", "message"), [("x.npz", "want a file ending in"), ("none.bin", "no such file")]
)
def test_other_kinds_and_missing_files_are_refused(tmp_path, name, message):
    with pytest.raises(TensorFileError, match=message):
        open_tensors(tmp_path / name)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("safetensors") / "x.safetensors"


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_byte_is_read_or_refused_and_never_crashes(path, changes):
    raw = bytearray(save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}))
    for position, byte in changes:
        raw[position % len(raw)] = byte
    path.write_bytes(raw)
    try:
        with open_tensors(path) as file:
            for name in file.names:
                file.read(name)
    except TensorFileError as error:
        assert "x.safetensors" in str(error)  # noqa: PT017
