"""Angles of rotary positions, by which `pallas_kernels.paged_attention` turns queries and keys.

T tokens, H head width, h = H / 2.
"""

import jax
import jax.numpy as jnp


def rotary_angles(position_T: jax.Array, *, head_width: int, theta: float) -> jax.Array:
    """Returns the `[T, h]` float32 angles of each token's position."""
    frequency_h = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    return position_T.astype(jnp.float32)[:, None] * frequency_h
