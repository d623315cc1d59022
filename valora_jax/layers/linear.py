"""The linear layer: a base product, and the updates of the adapters that its rows bring.

Linears that share an input are one matmul (q|k|v, gate|up) with one LoRA site a part.
T rows, D input width, E output width of all parts together.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from pallas_kernels.lora_matmul import base_product
from valora_jax.lora.batch import LoraBatch


class Linear(nnx.Module):
    """`x @ kernel + bias`, split into parts; part i belongs to LoRA site `sites[i]`."""

    def __init__(
        self,
        in_width: int,
        out_widths: Sequence[int],
        *,
        sites: Sequence[str],
        layer: int = 0,
        bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.sites, self.layer = tuple(sites), layer
        self.splits = tuple(itertools.accumulate(out_widths))[:-1]
        shape = (in_width, sum(out_widths))
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * in_width**-0.5)
        self.bias = nnx.Param(jnp.zeros(shape[1:], dtype)) if bias else None

    def __call__(self, x_TD: jax.Array, lora: LoraBatch | None) -> list[jax.Array]:
        """Returns one `[T, E_part]` array a part, in the dtype of `x_TD`."""
        return jnp.split(self.together(x_TD, lora), self.splits, axis=-1)

    def together(self, x_TD: jax.Array, lora: LoraBatch | None) -> jax.Array:
        """Returns the parts side by side, `[T, E]`."""
        kernel_DE, bias_E = self.kernel[...], self.bias[...] if self.bias is not None else None
        if lora is not None:
            return lora.linear(
                x_TD,
                kernel_DE,
                bias_E=bias_E,
                sites=self.sites,
                columns=(0, *self.splits),
                layer=self.layer,
            )
        return base_product(x_TD, kernel_DE, bias_E)
