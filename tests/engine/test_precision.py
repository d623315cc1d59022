import jax
import jax.numpy as jnp
import numpy as np
import pytest

from valora_jax.engine import precision
from valora_jax.engine.precision import Precision, bfloat16_gain, in_dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_named_type_is_the_type_of_everything(dtype):
    chosen = Precision.choose(dtype, stored="float16")
    assert (chosen.weights, chosen.prompts) == (np.dtype(dtype), np.dtype(dtype))


@pytest.mark.parametrize(
    ("stored", "want"),
    [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"), (None, "bfloat16")],
)
def test_an_accelerator_takes_the_checkpoints_16_bit_type(monkeypatch, stored, want):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    chosen = Precision.choose("auto", stored=stored)
    assert (chosen.weights, chosen.prompts) == (np.dtype(want), np.dtype(want))


@pytest.mark.parametrize(("gain", "prompts"), [(0.4, "float32"), (1.1, "float32"), (2, "bfloat16")])
def test_a_cpu_keeps_float32_but_for_prompts_that_bfloat16_speeds_up(monkeypatch, gain, prompts):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(precision, "bfloat16_gain", lambda: gain)
    chosen = Precision.choose("auto", stored="float16")
    assert (chosen.weights, chosen.prompts) == (np.dtype("float32"), np.dtype(prompts))


def test_the_gain_is_a_positive_number():
    assert 0 < bfloat16_gain() < 1000


def test_matrices_are_cast_and_what_few_rows_need_stays():
    paths = ["decoder.layers.0.mlp.down.kernel", "decoder.head.kernel", "decoder.norm.scale"]
    weights = {path: jnp.ones(2, jnp.float32) for path in paths}
    cast = in_dtype(weights, np.dtype(jnp.bfloat16))
    assert [cast[path].dtype.name for path in paths] == ["bfloat16", "float32", "float32"]
    assert cast["decoder.head.kernel"] is weights["decoder.head.kernel"]
