"""Products of blocks in the "triton" kernels."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def dot(a, b, *, contract: tuple[int, int]) -> jax.Array:
    """The product in float32, over one axis of each block."""
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        # Without the precision, Triton would round float32 to 10 bits first.
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def identity(size: int, dtype: DTypeLike) -> jax.Array:
    """What a block goes through the matmul unit with, unchanged.

    Loads of operands are those that Triton keeps in flight over several steps. To be used on the
    right: what is not finite stays in its row then.
    """
    i = jnp.arange(size)
    return (i[:, None] == i[None, :]).astype(dtype)
