"""Arrays in an Orbax checkpoint come back bit for bit, and damage is named."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from valora_jax.checkpoint.arrays import read_arrays, read_infos, save_arrays
from valora_jax.errors import TensorFileError

ARRAYS = {
    "decoder.layers.0.mlp.up.kernel": np.float16(np.arange(12)).reshape(3, 4),
    "vision.nan": np.array([np.nan, -0.0, np.inf], ml_dtypes.bfloat16),
    "scale": np.array(2.5, np.float32),
    "position_ids": np.arange(5, dtype=np.int64)[None],
    "a/b": np.array([True, False]),
}


def test_arrays_of_every_kind_come_back_bit_for_bit(tmp_path):
    save_arrays(tmp_path / "saved", ARRAYS)
    infos = read_infos(tmp_path / "saved")
    got = dict(read_arrays(tmp_path / "saved", infos, ARRAYS))
    assert list(got) == list(ARRAYS)
    for name, want in ARRAYS.items():
        assert (infos[name].shape, infos[name].dtype) == (want.shape, want.dtype)
        assert got[name].dtype == want.dtype
        assert got[name].tobytes() == want.tobytes()


def test_arrays_on_a_device_are_saved_too(tmp_path):
    save_arrays(tmp_path / "saved", {"x": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)})
    ((name, got),) = read_arrays(tmp_path / "saved", read_infos(tmp_path / "saved"), ["x"])
    assert name == "x"
    np.testing.assert_array_equal(got, np.arange(6).reshape(2, 3))


def test_an_array_without_elements_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="without elements: nothing"):
        save_arrays(tmp_path / "saved", {"nothing": np.zeros((0, 3)), "x": np.ones(1)})
    assert not (tmp_path / "saved").exists()


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(TensorFileError, match="missing: not a readable Orbax checkpoint"):
        read_infos(tmp_path / "missing")


def test_damaged_data_is_named(tmp_path):
    save_arrays(tmp_path / "saved", ARRAYS)
    infos = read_infos(tmp_path / "saved")
    for path in (tmp_path / "saved").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(TensorFileError, match="saved: damaged: "):
        list(read_arrays(tmp_path / "saved", infos, ["scale"]))
