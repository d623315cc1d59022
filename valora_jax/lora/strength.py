"""How large an adapter's update is beside the weights, and beside the rounding of merged weights.

A merged weight is rounded once. In 16 bits that rounding may be larger than a weak adapter's whole
update. All are squared Frobenius norms, so that they add up over linears.

    || s A^T B ||^2 = s^2 sum((A A^T) * (B B^T))         the update of a linear
    sum(ulp(W)^2 / 12)                                   the rounding error to be expected
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.lora_matmul import PAGE_RANKS, LoraPool

_SAMPLED_ROWS = 64
_LAYERS_AT_ONCE = 8


@jax.jit
def update_energy(pools: Mapping[str, LoraPool], slot: jax.Array) -> dict[str, jax.Array]:
    """Squared norms of the updates of the adapter in a slot.

    Args:
      pools: site -> rank pages.
      slot: scalar int32.

    Returns:
      Site -> `[layers]` float32.
    """
    return {site: _layers_energy(pool, slot) for site, pool in pools.items()}


def _layers_energy(pool: LoraPool, slot: jax.Array) -> jax.Array:
    layers, widest = pool.scale_LS.shape[0], pool.page_SW.shape[1]
    layer_rows = pool.layer_pages * PAGE_RANKS
    rank_R = jnp.arange(widest * PAGE_RANKS)
    used_R = rank_R // PAGE_RANKS < pool.pages_S[slot]
    row_R = pool.page_SW[slot][rank_R // PAGE_RANKS] * PAGE_RANKS + rank_R % PAGE_RANKS

    def of_layer(layer):
        def gram(x_RD):
            own_RD = jnp.where(used_R[:, None], x_RD[layer * layer_rows + row_R], 0)
            return jnp.einsum(
                "rd,sd->rs",
                own_RD,
                own_RD,
                precision=jax.lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )

        return pool.scale_LS[layer, slot] ** 2 * (gram(pool.a_RD) * gram(pool.b_RE)).sum()

    # Some at a time: few enough for their memory, enough to fill the device, which waits for this.
    return jax.lax.map(of_layer, jnp.arange(layers), batch_size=min(layers, _LAYERS_AT_ONCE))


class BaseEnergy[Number](NamedTuple):
    """Squared norms of a linear's weights, and of the rounding error that merging has to expect."""

    weights: Number
    rounding: Number


@functools.partial(jax.jit, static_argnames="columns")
def base_energy(kernel_DE: jax.Array, *, columns: tuple[int, ...]) -> list[BaseEnergy[jax.Array]]:
    """Measures a linear's parts, in its dtype, from a sample of rows.

    Args:
      kernel_DE: `[D, E]`.
      columns: where each part begins in E.

    Returns:
      One pair of float32 scalars a part.
    """
    sample_NE = kernel_DE[:: max(1, kernel_DE.shape[0] // _SAMPLED_ROWS)].astype(jnp.float32)
    _, exponent_NE = jnp.frexp(sample_NE)
    # `frexp` gives fractions in [0.5, 1): a unit in the last place is eps times half their scale.
    ulp_NE = jnp.ldexp(jnp.float32(jnp.finfo(kernel_DE.dtype).eps), exponent_NE - 1)
    error_NE = jnp.where(sample_NE == 0, 0, ulp_NE**2 / 12)
    scale = kernel_DE.shape[0] / sample_NE.shape[0]

    def of_parts(x_NE):
        return [part_NE.sum() * scale for part_NE in jnp.split(x_NE, columns[1:], axis=1)]

    return [*map(BaseEnergy, of_parts(sample_NE**2), of_parts(error_NE))]
