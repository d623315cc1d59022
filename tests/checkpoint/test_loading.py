"""A model from an Orbax folder equals the one from the Hugging Face folder it was made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoint import tiny_models
from valora_jax.checkpoint import is_orbax, load_model, load_weights, write_orbax
from valora_jax.checkpoint.folder import MANIFEST, Manifest
from valora_jax.convert import hf_to_orbax
from valora_jax.errors import CheckpointError, TensorFileError
from valora_jax.models import build, read_spec
from valora_jax.models.loading import read_config


def converted(source, tmp_path):
    hf_to_orbax(source, tmp_path / "orbax", overwrite=False, progress=False)
    return tmp_path / "orbax", read_spec(read_config(tmp_path / "orbax"))


def test_the_loaded_model_equals_that_of_the_source(tmp_path):
    source = tiny_models.CHECKPOINTS / "llava15-tiny-gqa"
    folder, spec = converted(source, tmp_path)
    assert is_orbax(folder)
    assert not is_orbax(source)
    for dtype in (jnp.float32, jnp.bfloat16):
        got = build.parameter_paths(load_model(folder, spec, dtype=dtype, progress=False))
        want = build.parameter_paths(build.load_model(source, spec, dtype=dtype, progress=False))
        assert got.keys() == want.keys()
        for path, leaf in got.items():
            assert leaf.get_value().dtype == dtype
            np.testing.assert_array_equal(leaf.get_value(), want[path].get_value())


def test_a_tied_head_is_stored_once_and_loaded_as_a_copy(tmp_path):
    folder, spec = converted(tiny_models.tied(tmp_path / "tied"), tmp_path)
    weights = load_weights(folder, spec, dtype=None, progress=False)
    np.testing.assert_array_equal(weights["decoder.head.kernel"], weights["decoder.embedding"].T)
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float16)}


def test_put_sees_every_parameter_once(tmp_path):
    folder, spec = converted(tiny_models.CHECKPOINTS / "llava15-13b-tiny", tmp_path)
    seen = []

    def put(array):
        seen.append(array.shape)
        return jax.device_put(array)

    load_weights(folder, spec, dtype=jnp.float32, put=put, progress=False)
    assert sorted(seen) == sorted(entry.shape for entry in spec.entries)


def test_arrays_of_another_model_are_listed_with_every_fault(tmp_path):
    spec = read_spec(read_config(tiny_models.CHECKPOINTS / "llava15-tiny"))
    arrays = {e.ours: np.ones(e.shape, np.float16) for e in spec.entries}
    del arrays["decoder.embedding"]
    arrays["projector.up.bias"] = np.ones(3, np.float16)
    arrays["stray"] = np.ones(3, np.float16)
    (tmp_path / "orbax").mkdir()
    write_orbax(tmp_path / "orbax", Manifest(kind="model", tensors=()), arrays)
    with pytest.raises(CheckpointError) as error:
        load_weights(tmp_path / "orbax", spec, dtype=None, progress=False)
    for part in (
        "missing from the checkpoint: decoder.embedding",
        "projector.up.bias: shape (3,), want (128,)",
        "not in the map: stray",
    ):
        assert part in str(error.value)


def test_numbers_too_large_for_the_dtype_are_named(tmp_path):
    name = "multi_modal_projector.linear_1.bias"
    large = {name: np.full(128, 1e6, np.float32)}
    source = tiny_models.edited(tmp_path / "large", config={}, add=large)
    folder, spec = converted(source, tmp_path)
    with pytest.raises(CheckpointError, match=r"projector.up.bias: holds .* too much"):
        load_weights(folder, spec, dtype=jnp.float16, progress=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no Orbax folder"),
        ("{", "damaged"),
        ('{"kind": "model"}', "damaged"),
        ('{"version": 9, "kind": "model", "tensors": [], "kept": []}', "version 9"),
        ('{"version": 1, "kind": "adapter", "tensors": [], "kept": []}', "holds an Orbax adapter"),
    ],
)
def test_a_folder_that_holds_no_model_is_refused(tmp_path, content, message):
    spec = read_spec(read_config(tiny_models.CHECKPOINTS / "llava15-tiny"))
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(TensorFileError, match=message):
        load_weights(tmp_path, spec, dtype=None, progress=False)
