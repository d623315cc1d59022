"""The LoRA operator: adds the low-rank updates of each row's adapters to a base product, in place.

    out_TE[t] = y_TE[t] + sum over branches (slot, sign) of row t's tile, pages p of the slot:
                sign * scale_LS[layer, slot] * (x_TD[t] @ A_p^T) @ B_p

A branch is the row's own adapter (+), or the adapter that is folded into the weights (-). A rank
page holds 16 rank rows of one adapter, for every layer; an adapter of rank r owns ceil(r / 16)
pages, so that memory and time follow the ranks in use. Linears that share an input are one call:
their outputs lie side by side in `y_TE`, each with a pool of its own.

T rows, D input width, E output width, L layers, S adapter slots, M row tiles.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np

from pallas_kernels.lora_matmul import tiles as triton_tiles
from pallas_kernels.lora_matmul import triton, xla
from pallas_kernels.lora_matmul.layout import LoraPool, RowTiles
from pallas_kernels.lora_matmul.tiles import LoraTile

Implementation = Literal["triton", "xla"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One linear's share of a product: `y_TE[:, column : column + E_part]`, with its pool."""

    pool: LoraPool
    column: int


def block_rows(rows: int, *, implementation: Implementation) -> int:
    """Height of row tiles that suits an implementation and a number of rows."""
    return xla.BLOCK_ROWS if implementation == "xla" else triton_tiles.block_rows(rows)


def lora_matmul(
    y_TE: jax.Array,
    x_TD: jax.Array,
    parts: Sequence[Part],
    *,
    tiles: RowTiles,
    layer: int,
    implementation: Implementation,
    tile: LoraTile | None = None,
) -> jax.Array:
    """Adds each row's adapters to the base products of linears that share an input.

    Args:
      y_TE: `[T, E]` base products side by side; overwritten in place where XLA may.
      x_TD: `[T, D]` input of the linears, same dtype as `y_TE`.
      parts: pools, and where their outputs lie; columns of no part stay as they are. Pools are
        cast to the dtype of `x_TD` where they differ.
      tiles: which rows multiply which adapters. Their values are on the device and are not
        checked.
      layer: which layer's rows of each page to use, in `[0, layers)`.
      implementation: "triton" for NVIDIA GPUs, "xla" anywhere.
      tile: shape of the "triton" kernels' blocks; the tuned or computed one by default.

    Returns:
      `[T, E]` in the dtype of `y_TE`; products accumulate in float32, in an order that depends on
      the tile alone: equal inputs give equal bits.

    Raises:
      ValueError: the shapes contradict each other.
      NotImplementedError: the "triton" kernels do not take these shapes or dtypes; "xla" does.
    """
    (T, D), E = x_TD.shape, y_TE.shape[1]
    if y_TE.shape[0] != T:
        raise ValueError(f"row counts differ: x_TD has {T}, y_TE {y_TE.shape[0]}")
    for part in parts:
        pool, stop = part.pool, part.column + part.pool.b_RE.shape[1]
        if pool.a_RD.shape[1] != D:
            raise ValueError(f"pool is for inputs of width {pool.a_RD.shape[1]}, x_TD has {D}")
        if not 0 <= part.column <= stop <= E:
            raise ValueError(f"columns {part.column}:{stop} of a part exceed y_TE's {E}")
        if not 0 <= layer < (layers := pool.scale_LS.shape[0]):
            raise ValueError(f"layer={layer} is not in [0, {layers})")
    if not parts:
        return y_TE
    pools, columns = tuple(p.pool for p in parts), tuple(p.column for p in parts)
    match implementation:
        case "xla":
            return xla.lora_matmul(y_TE, x_TD, pools, tiles, np.int32(layer), columns=columns)
        case "triton":
            return triton.lora_matmul(
                y_TE, x_TD, pools, tiles, np.int32(layer), columns=columns, tile=tile
            )
    raise ValueError(f"unknown implementation {implementation!r}; known: 'triton', 'xla'")
