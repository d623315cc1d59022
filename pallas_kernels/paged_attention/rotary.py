"""Rotary positions in two halves: component i turns with component i + H / 2.

T tokens, N heads, H head width, h = H / 2.
"""

import jax
import jax.numpy as jnp


def rotate(x_TNH: jax.Array, angle_Th: jax.Array) -> jax.Array:
    """Turns each head's halves by the token's angles, in float32; keeps the dtype."""
    # Without the barrier a CPU computes them anew for every head.
    sin_Th, cos_Th = jax.lax.optimization_barrier((jnp.sin(angle_Th), jnp.cos(angle_Th)))
    sin_T1h, cos_T1h = sin_Th[:, None], cos_Th[:, None]
    low, high = jnp.split(x_TNH.astype(jnp.float32), 2, axis=-1)
    turned = [low * cos_T1h - high * sin_T1h, high * cos_T1h + low * sin_T1h]
    return jnp.concatenate(turned, axis=-1).astype(x_TNH.dtype)
