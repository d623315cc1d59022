"""LLaVA-1.5's tower and projector against transformers; parameter names against the weight map."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from valora_jax.engine.precision import in_dtype
from valora_jax.models import read_spec
from valora_jax.models.build import (
    abstract_model,
    load_model,
    parameter_paths,
    random_model,
    with_weights,
)
from valora_jax.models.llava15.config import LLAVA_1_5_7B, LLAVA_1_5_13B
from valora_jax.models.llava15.spec import spec_of
from valora_jax.models.llava15.weights import expected_shapes
from valora_jax.models.loading import read_config

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
# float32 on both sides; the kit's own float32 runs differ by 7e-5 on logits.
FLOAT32 = {"rtol": 0, "atol": 5e-5}


@pytest.mark.parametrize(
    ("cfg", "parameters"), [(LLAVA_1_5_7B, 7_063_427_072), (LLAVA_1_5_13B, 13_351_494_656)]
)
def test_the_full_size_model_has_the_parameters_of_the_weight_map(cfg, parameters):
    model = abstract_model(spec_of(cfg), dtype=jnp.bfloat16)
    shapes = {path: leaf.get_value().shape for path, leaf in parameter_paths(model).items()}
    assert shapes == expected_shapes(cfg)
    assert sum(map(math.prod, shapes.values())) == parameters


@pytest.mark.parametrize("name", ["llava15-tiny", "llava15-tiny-gqa", "llava15-13b-tiny"])
def test_image_features_equal_those_of_transformers(name):
    folder = GOLDENS / "checkpoints" / name
    model = load_model(folder, read_spec(read_config(folder)), dtype=jnp.float32, progress=False)
    golden = np.load(GOLDENS / "features" / f"{name}.npz")
    encode = jax.jit(lambda pixels_I3hw: model.encode_images(pixels_I3hw, lora=None))
    got_IXD = np.asarray(encode(golden["pixel_values"]))
    np.testing.assert_allclose(
        got_IXD.reshape(golden["image_features"].shape), golden["image_features"], **FLOAT32
    )


def test_the_tower_computes_in_the_dtype_of_its_matrices():
    spec = read_spec(read_config(GOLDENS / "checkpoints" / "llava15-tiny"))
    model = random_model(spec, dtype=jnp.float32, seed=1)
    weights = {path: leaf.get_value() for path, leaf in parameter_paths(model).items()}
    mixed = with_weights(spec, in_dtype(weights, np.dtype(jnp.bfloat16)), dtype=jnp.float32)
    pixels_I3hw = jnp.zeros((1, *spec.pixel_shape), jnp.bfloat16)
    features = jax.eval_shape(lambda: mixed.encode_images(pixels_I3hw, lora=None))
    assert features.dtype == jnp.bfloat16


def test_random_weights_are_reproducible():
    spec = read_spec(read_config(GOLDENS / "checkpoints" / "llava15-13b-tiny"))
    first, second = (
        parameter_paths(random_model(spec, dtype=jnp.bfloat16, seed=seed)) for seed in (1, 1)
    )
    for path, leaf in first.items():
        assert leaf.get_value().dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf.get_value(), second[path].get_value())
