"""Normalisations, computed in float32 whatever the dtype. D is the width."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale`."""

    def __init__(self, width: int, *, eps: float, dtype: DTypeLike):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        # Llama rounds before it scales; so do we, or 16-bit logits drift from the original's.
        return wide.astype(x.dtype) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """`(x - mean) / std * scale + bias`."""

    def __init__(self, width: int, *, eps: float, dtype: DTypeLike):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide -= wide.mean(-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (wide * self.scale[...] + self.bias[...]).astype(x.dtype)
