"""The gated MLP of Llama-like decoders: `down(silu(gate x) * up x)`. T tokens, D width."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from valora_jax.layers.linear import Linear
from valora_jax.lora.batch import LoraBatch


class GatedMlp(nnx.Module):
    """gate and up are one matmul."""

    def __init__(self, width: int, *, mlp_width: int, layer: int, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = functools.partial(Linear, layer=layer, dtype=dtype, rngs=rngs)
        sites = ("decoder.gate", "decoder.up")
        self.gate_up = linear(width, (mlp_width, mlp_width), sites=sites)
        self.down = linear(mlp_width, (width,), sites=("decoder.down",))

    def __call__(self, x_TD: jax.Array, *, lora: LoraBatch | None) -> jax.Array:
        gate_TF, up_TF = self.gate_up(x_TD, lora)
        # In float32, rounded once: a CPU takes twice as long to round after every operation.
        hidden_TF = jax.nn.silu(gate_TF.astype(jnp.float32)) * up_TF
        (out_TD,) = self.down(hidden_TF.astype(x_TD.dtype), lora)
        return out_TD
