import jax
import jax.numpy as jnp
import numpy as np
import pytest

from valora_jax.engine import precision
from valora_jax.engine.precision import Precision, bfloat16_gain, in_dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_named_type_is_the_type_of_everything(dtype):
    chosen = Precision.choose(dtype, stored="float16")
    assert chosen == Precision.uniform(dtype)


@pytest.mark.parametrize(
    ("stored", "want"),
    [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"), (None, "bfloat16")],
)
def test_an_accelerator_takes_the_checkpoints_16_bit_type(monkeypatch, stored, want):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    chosen = Precision.choose("auto", stored=stored)
    assert chosen == Precision.uniform(want)


@pytest.mark.parametrize(
    ("prompt_gain", "several_gain", "prompts", "decodes"),
    [
        (0.4, 2, "float32", "float32"),
        (1.1, 2, "float32", "float32"),
        (2, 0.9, "bfloat16", "float32"),
        (2, 1.2, "bfloat16", "bfloat16"),
    ],
)
def test_a_cpu_takes_bfloat16_where_it_is_faster_and_worth_a_copy(
    monkeypatch, prompt_gain, several_gain, prompts, decodes
):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    gain_of_rows = {256: prompt_gain, precision.SEVERAL_ROWS: several_gain}
    monkeypatch.setattr(precision, "bfloat16_gain", gain_of_rows.__getitem__)
    assert Precision.choose("auto", stored="float16") == Precision(
        weights=np.dtype("float32"), prompts=np.dtype(prompts), decodes=np.dtype(decodes)
    )


@pytest.mark.parametrize("rows", [4, 256])
def test_the_gain_is_a_positive_number(rows):
    assert 0 < bfloat16_gain(rows) < 1000


def test_matrices_are_cast_and_what_few_rows_need_stays():
    paths = ["decoder.layers.0.mlp.down.kernel", "decoder.head.kernel", "decoder.norm.scale"]
    weights = {path: jnp.ones(2, jnp.float32) for path in paths}
    cast = in_dtype(weights, np.dtype(jnp.bfloat16))
    assert [cast[path].dtype.name for path in paths] == ["bfloat16", "float32", "float32"]
    assert cast["decoder.head.kernel"] is weights["decoder.head.kernel"]
