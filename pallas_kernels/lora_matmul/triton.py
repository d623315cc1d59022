"""The LoRA operator for NVIDIA GPUs, in Pallas-Triton: two launches for all parts of a product.

    shrink  h_UC[u * T + t, ranks] = scale * x_TD[t, range u of D] @ A_RD[ranks, range u of D]^T
    expand  u_TE[t] = (sum over u of h_UC[u * T + t, ranks]) @ B_RE[ranks]

A row tile's ranks in a part are those of the adapter it adds, page by page, then those of the one
it subtracts: one list, so that both branches share a block. Which ranges and columns a program
multiplies is known from its place in the grid, and one row of a table says everything about its row
tile: a decode is bound by the loads that wait for each other, each of which may come from DRAM.
Tiles, ranks and adapters are run-time data. Partial sums are added in order: equal inputs give
equal bits.

U splits * T rows of partial sums, C rank columns of all parts; other letters as in `api`, `layout`
and `rank_tables`. Lower case is one block: t rows, d input columns, r ranks, e output columns.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.lora_matmul.column_segments import column_segments
from pallas_kernels.lora_matmul.layout import LoraPool, RowTiles
from pallas_kernels.lora_matmul.rank_tables import rank_tables
from pallas_kernels.lora_matmul.tiles import LoraTile, refusals
from pallas_kernels.lora_matmul.triton_expand import Expand
from pallas_kernels.lora_matmul.triton_shrink import Shrink

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


# Under a jit of its own, with the layer as an operand, a step of many layers traces and lowers this
# once a shape. XLA inlines it again, and then computes the rank lists once for all layers.
@functools.partial(jax.jit, static_argnames=("columns", "E", "dtype", "tile"))
def lora_update(
    x_TD: jax.Array,
    pools: tuple[LoraPool, ...],
    tiles: RowTiles,
    layer: jax.Array,
    *,
    columns: tuple[int, ...],
    E: int,
    dtype: DTypeLike,
    tile: LoraTile,
) -> jax.Array:
    """Returns what is added to base products, `[T, E]` in `dtype`; zeros where nothing is.

    See `api.lora_matmul`, which has checked the shapes; `columns` are the parts' first ones.
    """
    check_rows(x_TD, tiles, block_rows=tile.block_rows)
    if dtype not in (x_TD.dtype, jnp.float32):
        raise NotImplementedError(
            f"the triton kernels take y_TE in the dtype of x_TD, {x_TD.dtype}, or in float32, "
            f'not {dtype}; cast it or use implementation="xla"'
        )
    if faults := refusals(tile, itemsize=jnp.dtype(dtype).itemsize):
        raise ValueError(f"{tile} is not legal: " + "; ".join(faults))
    tables, list_ranks = rank_tables(
        pools,
        tiles,
        block_ranks=max(tile.shrink.block_ranks, tile.expand.block_ranks),
        rank_programs=tile.shrink.rank_programs,
    )
    along_rows = dict(
        block_rows=tile.block_rows,
        row_programs=min(tile.row_programs, tiles.first_M.shape[0]),
    )
    shrink = Shrink.of(pools, list_ranks=list_ranks, cut=tile.shrink, **along_rows)
    h_UC = shrink.launch(layer, x_TD, tables, pools)
    expand = Expand(
        segments=tuple(column_segments(pools, columns, E)),
        pages=tuple(pool.layer_pages for pool in pools),
        rows=x_TD.shape[0],
        dtype=x_TD.dtype,
        cut=tile.expand,
        **along_rows,
    )
    return expand.launch(layer, tables, h_UC, pools, dtype=dtype)


def check_rows(x_TD: jax.Array, tiles: RowTiles, *, block_rows: int) -> None:
    """Refuses rows that kernels with blocks of so many rows do not take."""
    if x_TD.dtype not in DTYPES:
        raise NotImplementedError(
            f"the triton kernels take x_TD in one of bfloat16, float16 and float32, not "
            f'{x_TD.dtype}; cast it or use implementation="xla"'
        )
    if block_rows < tiles.block_rows:
        raise ValueError(
            f"row tiles of {tiles.block_rows} rows exceed the kernels' {block_rows}: "
            "make them with RowTiles.of(block_rows=tile.block_rows)"
        )
