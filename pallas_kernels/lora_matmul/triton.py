"""The LoRA operator for NVIDIA GPUs, in Pallas-Triton: two launches for all parts of a product.

    shrink  h_UC[u * T + t, ranks] = scale * x_TD[t, range u of D] @ A_RD[ranks, range u of D]^T
    expand  y_TE[t] += (sum over u of h_UC[u * T + t, ranks]) @ B_RE[ranks]

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
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lora_matmul.layout import PAGE_RANKS, LoraPool, RowTiles
from pallas_kernels.lora_matmul.rank_tables import (
    TileRow,
    for_each_tile,
    page_ids,
    pool_rows,
    rank_tables,
    ranks_of,
    rows_of,
)
from pallas_kernels.lora_matmul.tiles import ExpandTile, LoraTile, refusals
from pallas_kernels.lora_matmul.triton_dot import dot, identity
from pallas_kernels.lora_matmul.triton_shrink import Shrink

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


# Under a jit of its own, with the layer as an operand, a step of many layers traces and lowers this
# once a shape. XLA inlines it again, and then computes the rank lists once for all layers.
@functools.partial(jax.jit, static_argnames=("columns", "tile"))
def lora_matmul(
    y_TE: jax.Array,
    x_TD: jax.Array,
    pools: tuple[LoraPool, ...],
    tiles: RowTiles,
    layer: jax.Array,
    *,
    columns: tuple[int, ...],
    tile: LoraTile,
) -> jax.Array:
    """See `api.lora_matmul`, which has checked the shapes; `columns` are the parts' first ones."""
    check_rows(x_TD, tiles, block_rows=tile.block_rows)
    if y_TE.dtype not in (x_TD.dtype, jnp.float32):
        raise NotImplementedError(
            f"the triton kernels take y_TE in the dtype of x_TD, {x_TD.dtype}, or in float32, "
            f'not {y_TE.dtype}; cast it or use implementation="xla"'
        )
    if faults := refusals(tile, itemsize=y_TE.dtype.itemsize):
        raise ValueError(f"{tile} is not legal: " + "; ".join(faults))
    tables, list_ranks = rank_tables(
        pools,
        tiles,
        block_ranks=max(tile.shrink.block_ranks, tile.expand.block_ranks),
        rank_programs=tile.shrink.rank_programs,
    )
    shrink = Shrink.of(
        pools,
        list_ranks=list_ranks,
        block_rows=tile.block_rows,
        row_programs=min(tile.row_programs, tiles.first_M.shape[0]),
        cut=tile.shrink,
    )
    h_UC = shrink.launch(layer, x_TD, tables, pools)
    return _expand(y_TE, h_UC, pools, tables, layer, columns=columns, dtype=x_TD.dtype, tile=tile)


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


def _expand(y_TE, h_UC, pools, tables, layer, *, columns, dtype, tile: LoraTile) -> jax.Array:
    """Launches the expand, in place on `y_TE`; h and B are multiplied in `dtype`."""
    cut = tile.expand
    body = functools.partial(
        _expand_body,
        columns=columns,
        pages=tuple(pool.layer_pages for pool in pools),
        dtype=dtype,
        block_rows=tile.block_rows,
        cut=cut,
    )
    programs = sum(_column_programs(pool.b_RE, cut) for pool in pools)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(y_TE.shape, y_TE.dtype),
        grid=(programs, min(tile.row_programs, tables[0].shape[0] - 1)),
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        input_output_aliases={0: 0},
        name="lora_expand",
    )(y_TE, layer, tables, h_UC, tuple(pool.b_RE for pool in pools))


def _column_programs(b_RE, cut: ExpandTile) -> int:
    return pl.cdiv(b_RE.shape[1], cut.block_columns * cut.blocks)


def _expand_body(
    y_TE, layer, tables, h_UC, b_refs, out_TE, *, columns, pages, dtype, block_rows, cut: ExpandTile
):
    list_ranks = h_UC.shape[1] // len(b_refs)
    any_program, first_m = (pl.program_id(axis) for axis in range(2))
    row_programs, first_program = pl.num_programs(1), 0
    for i, (table_MX, b_RE) in enumerate(zip(tables, b_refs, strict=True)):
        program, programs = any_program - first_program, _column_programs(b_RE, cut)
        first_program += programs
        multiply = functools.partial(
            _add_in_flight if cut.stages > 1 else _add_at_once,
            y_TE=y_TE,
            layer=layer,
            table_MX=table_MX,
            h_UC=h_UC,
            b_RE=b_RE,
            out_TE=out_TE,
            first_block=program * cut.blocks,
            first_column=columns[i],
            first_rank=i * list_ranks,
            pages=pages[i],
            dtype=dtype,
            block_rows=block_rows,
            cut=cut,
        )

        @pl.when((program >= 0) & (program < programs))
        def _(multiply=multiply, table_MX=table_MX):
            block = dict(block=0, block_ranks=cut.block_ranks)
            for_each_tile(multiply, table_MX, first_m, row_programs, **block)


def _add_at_once(of: TileRow, m, *, first_block, block_rows: int, cut: ExpandTile, **operands):
    """Adds `h @ B` to row tile m of a part, in some blocks of its columns, step after step."""
    row_t, in_tile_t = rows_of(of, block_rows=block_rows)
    # Most tiles of a decode have one row, for which a block of rows takes as many instructions as
    # for all of them; these bound many small programs.
    one_row = (of.rows == 1) & (block_rows < 64)

    def add(n, _):
        add_to = functools.partial(_add_block, of, m, first_block + n, cut=cut, **operands)

        @pl.when((of.pages > 0) & one_row)
        def _():
            add_to(of.first, one_row)

        @pl.when((of.pages > 0) & ~one_row)
        def _():
            add_to(row_t[:, None], in_tile_t[:, None])

    jax.lax.fori_loop(0, cut.blocks, add, None)


def _add_block(
    of: TileRow,
    m,
    block,
    row,
    is_row,
    *,
    y_TE,
    layer,
    table_MX,
    h_UC,
    b_RE,
    out_TE,
    first_column: int,
    first_rank: int,
    pages: int,
    dtype,
    cut: ExpandTile,
) -> None:
    """Adds to a block of columns of rows `[t, 1]`, or of one row, a scalar."""
    T, block_ranks = y_TE.shape[0], cut.block_ranks
    at_e = block * cut.block_columns + jnp.arange(cut.block_columns)
    in_part_e = at_e < b_RE.shape[1]

    def beside(of_row):
        return of_row[None, :] if row.ndim else of_row

    # Loaded first, for its latency; added last, in the layout in which it is stored.
    y_at, y_mask = (row, beside(first_column + at_e)), is_row & beside(in_part_e)
    y = plgpu.load(y_TE.at[*y_at], mask=y_mask, other=0)

    def add_ranks(k, carry):
        sums, page_r = carry
        next_page_r = page_ids(table_MX, m, k + 1, block_ranks=block_ranks)
        rank_r, in_list_r = ranks_of(of, k, block_ranks=block_ranks)
        row_r = pool_rows(page_r, rank_r, layer=layer, pages=pages)
        b_at, mask_re = (row_r[:, None], at_e[None, :]), in_list_r[:, None] & in_part_e[None, :]
        b_re = plgpu.load(b_RE.at[*b_at], mask=mask_re, other=0).astype(dtype)
        h_mask = is_row & beside(in_list_r)
        h = _sum_of_splits(h_UC, row, beside(first_rank + rank_r), h_mask, T=T).astype(dtype)
        if row.ndim:
            sums += dot(h, b_re, contract=(1, 0))
        else:
            sums += jnp.sum(h.astype(jnp.float32)[:, None] * b_re.astype(jnp.float32), axis=0)
        return sums, next_page_r

    steps = pl.cdiv(of.pages * PAGE_RANKS, block_ranks)
    zeros = jnp.zeros(y.shape, jnp.float32)
    sums, _ = jax.lax.fori_loop(0, steps, add_ranks, (zeros, of.page_r))
    out = (y.astype(jnp.float32) + sums).astype(out_TE.dtype)
    plgpu.store(out_TE.at[*y_at], out, mask=y_mask)


def _add_in_flight(
    of: TileRow,
    m,
    *,
    y_TE,
    layer,
    table_MX,
    h_UC,
    b_RE,
    out_TE,
    first_block,
    first_column: int,
    first_rank: int,
    pages: int,
    dtype,
    block_rows: int,
    cut: ExpandTile,
) -> None:
    """Adds `h @ B` to row tile m of a part, the loads of several steps in flight.

    y goes through the matmul unit, too, for its loads: see `identity`.
    """
    T, block_ranks = y_TE.shape[0], cut.block_ranks
    row_t, in_tile_t = rows_of(of, block_rows=block_rows)
    identity_ee = identity(cut.block_columns, y_TE.dtype)
    steps = pl.cdiv(of.pages * PAGE_RANKS, block_ranks)

    def add(i, sum_te):
        n, k = jax.lax.div(i, steps), jax.lax.rem(i, steps)
        page_r = page_ids(table_MX, m, k, block_ranks=block_ranks)
        at_e = (first_block + n) * cut.block_columns + jnp.arange(cut.block_columns)
        in_part_e = at_e < b_RE.shape[1]
        y_at = (row_t[:, None], (first_column + at_e)[None, :])
        ends_te = in_tile_t[:, None] & in_part_e[None, :] & (k == steps - 1)
        y_te = plgpu.load(y_TE.at[*y_at], mask=ends_te, other=0)
        rank_r, in_list_r = ranks_of(of, k, block_ranks=block_ranks)
        mask_tr = in_tile_t[:, None] & in_list_r[None, :]
        h_at = (row_t[:, None], (first_rank + rank_r)[None, :])
        h_tr = _sum_of_splits(h_UC, *h_at, mask_tr, T=T)
        row_r = pool_rows(page_r, rank_r, layer=layer, pages=pages)
        b_at, mask_re = (row_r[:, None], at_e[None, :]), in_list_r[:, None] & in_part_e[None, :]
        b_re = plgpu.load(b_RE.at[*b_at], mask=mask_re, other=0)
        sum_te = jnp.where(k == 0, 0, sum_te)
        sum_te += dot(h_tr.astype(dtype), b_re.astype(dtype), contract=(1, 0))
        sum_te += dot(y_te, identity_ee, contract=(1, 0))
        plgpu.store(out_TE.at[*y_at], sum_te.astype(out_TE.dtype), mask=ends_te)
        return sum_te

    zeros_te = jnp.zeros((block_rows, cut.block_columns), jnp.float32)
    jax.lax.fori_loop(0, cut.blocks * steps, add, zeros_te)


def _sum_of_splits(h_UC, row, at_r, mask, *, T: int) -> jax.Array:
    """The partial sums of T rows each, added up in order: `[t, r]`, or `[r]` of one row."""
    splits = h_UC.shape[0] // T
    h_u = [  # unrolled, so that all loads are in flight
        plgpu.load(h_UC.at[u * T + row, at_r], mask=mask, other=0) for u in range(splits)
    ]
    return functools.reduce(jnp.add, h_u)
