"""Lowering a kernel asks nobody for a module of Triton's dialect."""

import sys

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import triton_dialect
from tests.pallas_kernels import hopper


def test_the_dialect_is_found_at_once(monkeypatch):
    assert triton_dialect.__name__ in sys.modules
    searched = []

    class Searches:
        def find_spec(self, name, path=None, target=None):
            searched.append(name)

    def double(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    launch = pl.pallas_call(double, out_shape=x, compiler_params=plgpu.CompilerParams())
    monkeypatch.setattr(sys, "meta_path", [Searches(), *sys.meta_path])
    assert hopper.launches(hopper.lower_for_hopper(launch, x)) == 1
    assert not [name for name in searched if name.endswith(".tt")]
