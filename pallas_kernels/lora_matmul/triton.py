"""The LoRA operator for NVIDIA GPUs, in Pallas-Triton: two launches for all parts of a product.

    shrink  h_UC[u * T + t, ranks] = scale * x_TD[t, range u of D] @ A_RD[ranks, range u of D]^T
    expand  y_TE[t] += (sum over u of h_UC[u * T + t, ranks]) @ B_RE[ranks]

A row tile's ranks in a part are those of the adapter it adds, page by page, then those of the one
it subtracts: one list, so that both branches share a block. Which ranges and columns a program
multiplies is known from its place in the grid, and one row of a table says everything about its row
tile: a decode is bound by the loads that wait for each other, each of which may come from DRAM.
Tiles, ranks and adapters are run-time data. Partial sums are added in order: equal inputs give
equal bits.

M row tiles, X numbers about one in a part, U splits * T rows of partial sums, C rank columns of all
parts; other letters as in `api` and `layout`. Lower case is one block: t rows, d input columns, r
ranks, e output columns.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lora_matmul.layout import PAGE_RANKS, LoraPool, RowTiles
from pallas_kernels.lora_matmul.tiles import (
    ExpandTile,
    LoraTile,
    refusals,
)

# Of one adapter in one linear; who loads adapters refuses higher ranks. A slot has room for as many
# pages as the pool, the partial sums only for this: one adapter that is added, one subtracted.
MAX_RANK = 256
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


class TileRow(NamedTuple):
    """A row tile in one part, as a kernel reads it from the part's table.

    Attributes:
      first, rows: its rows; none if the tile is not in use.
      pages: in its list, 0 for none.
      plus_pages: how many of them, the first ones, are of the adapter that is added.
      plus, minus: slots of the adapter that is added, and of the one that is subtracted.
      in_use: tiles in use, the same for all.
      page_r: page of each rank of the program's first block.
    """

    first: jax.Array
    rows: jax.Array
    pages: jax.Array
    plus_pages: jax.Array
    plus: jax.Array
    minus: jax.Array
    in_use: jax.Array
    page_r: jax.Array


TILE_FIELDS = 8  # numbers before the page ids of a row of a table: those of `TileRow`, and a space


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
    check(x_TD, y_TE, tiles, tile)
    most_pages = min(MAX_RANK // PAGE_RANKS, max(pool.page_SW.shape[1] for pool in pools))
    block_pages = max(tile.shrink.block_ranks, tile.expand.block_ranks) // PAGE_RANKS
    list_pages = pl.cdiv(2 * most_pages, block_pages) * block_pages
    # The kernels read the page ids of a program's next block before they know if there is one.
    width = TILE_FIELDS + list_pages + block_pages * tile.shrink.rank_programs
    tables = tuple(rank_table(pool, tiles, most_pages=most_pages, width=width) for pool in pools)
    list_ranks = list_pages * PAGE_RANKS
    h_UC = shrink(x_TD, pools, tables, layer, list_ranks=list_ranks, tile=tile)
    return _expand(y_TE, h_UC, pools, tables, layer, columns=columns, tile=tile)


def check(x_TD: jax.Array, y_TE: jax.Array, tiles: RowTiles, tile: LoraTile) -> None:
    if x_TD.dtype != y_TE.dtype or x_TD.dtype not in DTYPES:
        raise NotImplementedError(
            f"the triton kernels take x_TD and y_TE both in one of bfloat16, float16 and float32, "
            f'not {x_TD.dtype} and {y_TE.dtype}; cast them or use implementation="xla"'
        )
    if tile.block_rows < tiles.block_rows:
        raise ValueError(
            f"row tiles of {tiles.block_rows} rows exceed the kernels' {tile.block_rows}: "
            "make them with RowTiles.of(block_rows=tile.block_rows)"
        )
    if faults := refusals(tile, itemsize=x_TD.dtype.itemsize):
        raise ValueError(f"{tile} is not legal: " + "; ".join(faults))


def rank_table(pool: LoraPool, tiles: RowTiles, *, most_pages: int, width: int) -> jax.Array:
    """All that the kernels ask about each row tile in a part, in one row: one load away.

    Returns `[M + 1, X]` int32: the numbers of a `TileRow`, a space, then the page ids of the tile's
    list; after its end they are anything. Tiles that are not in use, and the last row, have no rows
    and no pages. The same in all layers, so that XLA makes it once a step.
    """
    in_use_M = jnp.arange(tiles.first_M.shape[0] + 1) < tiles.count
    first_M, len_M, plus_M, minus_M = (
        jnp.pad(of_tile, (0, 1), constant_values=-1)
        for of_tile in (tiles.first_M, tiles.len_M, tiles.plus_M, tiles.minus_M)
    )

    def pages_of(slot_M):
        pages_M = jnp.minimum(pool.pages_S.at[slot_M].get(mode="clip"), most_pages)
        return jnp.where(in_use_M & (slot_M >= 0), pages_M, 0)

    plus_pages_M, minus_pages_M = pages_of(plus_M), pages_of(minus_M)
    q_X = jnp.arange(width) - TILE_FIELDS
    of_plus_MX = q_X < plus_pages_M[:, None]
    slot_MX = jnp.where(of_plus_MX, plus_M[:, None], minus_M[:, None])
    at_MX = jnp.where(of_plus_MX, q_X, q_X - plus_pages_M[:, None])
    table_MX = pool.page_SW.at[slot_MX, at_MX].get(mode="clip")
    fields = dict(
        first=first_M,
        rows=jnp.where(in_use_M, len_M, 0),
        pages=plus_pages_M + minus_pages_M,
        plus_pages=plus_pages_M,
        plus=jnp.maximum(plus_M, 0),
        minus=jnp.maximum(minus_M, 0),
        in_use=jnp.full_like(first_M, tiles.count),
    )
    for name, of_tile_M in fields.items():
        column = TileRow._fields.index(name) - TILE_FIELDS
        table_MX = jnp.where(q_X == column, of_tile_M[:, None], table_MX)
    return table_MX


def shrink(x_TD, pools, tables, layer, *, list_ranks: int, tile: LoraTile) -> jax.Array:
    """Launches the shrink; sums of rows and ranks that do not exist are left unwritten."""
    (T, D), cut = x_TD.shape, tile.shrink
    steps = pl.cdiv(D, cut.block_k)
    split_steps = pl.cdiv(steps, cut.splits)
    splits = pl.cdiv(steps, split_steps)
    row_programs = min(tile.row_programs, tables[0].shape[0] - 1)
    body = functools.partial(
        _shrink_body,
        pages=tuple(layer_pages(pool) for pool in pools),
        list_ranks=list_ranks,
        split_steps=split_steps,
        block_rows=tile.block_rows,
        cut=cut,
    )
    h_dtype = x_TD.dtype if splits == 1 else jnp.float32
    a_refs, scale_refs = (tuple(getattr(p, name) for p in pools) for name in ("a_RD", "scale_LS"))
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((splits * T, len(pools) * list_ranks), h_dtype),
        # Neighbouring programs share rows of x.
        grid=(len(pools) * cut.rank_programs, splits, row_programs),
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        name="lora_shrink",
    )(layer, x_TD, tables, a_refs, scale_refs)


def _shrink_body(
    layer,
    x_TD,
    tables,
    a_refs,
    scale_refs,
    h_UC,
    *,
    pages,
    list_ranks,
    split_steps,
    block_rows,
    cut,
):
    part_block, split, first_m = (pl.program_id(axis) for axis in range(3))
    T, row_programs = x_TD.shape[0], pl.num_programs(2)
    part = jax.lax.div(part_block, cut.rank_programs)
    first_block = jax.lax.rem(part_block, cut.rank_programs)
    for i, (table_MX, a_RD, scale_LS) in enumerate(zip(tables, a_refs, scale_refs, strict=True)):

        def multiply(of: TileRow, m, *, i=i, table_MX=table_MX, a_RD=a_RD, scale_LS=scale_LS):
            row_t, in_tile_t = _rows(of, block_rows=block_rows)
            plus_scale, minus_scale = scale_LS[layer[...], of.plus], scale_LS[layer[...], of.minus]

            def multiply_ranks(n, page_r):
                k = first_block + n * cut.rank_programs
                next_k = k + cut.rank_programs
                next_page_r = _page_ids(table_MX, m, next_k, block_ranks=cut.block_ranks)
                rank_r, in_list_r = _ranks(of, k, block_ranks=cut.block_ranks)
                row_r = pool_rows(page_r, rank_r, layer=layer, pages=pages[i])
                h_tr = _dot_over_inputs(
                    x_TD,
                    a_RD,
                    (row_t[:, None], row_r[:, None]),
                    (in_tile_t[:, None], in_list_r[:, None]),
                    first_step=split * split_steps,
                    steps=split_steps,
                    block_k=cut.block_k,
                )
                of_plus_r = rank_r < of.plus_pages * PAGE_RANKS
                h_tr *= jnp.where(of_plus_r, plus_scale, -minus_scale)[None, :]
                at_t, at_r = split * T + row_t, i * list_ranks + rank_r
                h_at = h_UC.at[at_t[:, None], at_r[None, :]]
                plgpu.store(h_at, h_tr.astype(h_UC.dtype), mask=in_tile_t[:, None])
                return next_page_r

            blocks = pl.cdiv(of.pages * PAGE_RANKS, cut.block_ranks)
            steps = pl.cdiv(blocks - first_block, cut.rank_programs)
            jax.lax.fori_loop(0, steps, multiply_ranks, of.page_r)

        @pl.when(part == i)
        def _(multiply=multiply, table_MX=table_MX):
            read = functools.partial(
                _read, table_MX, block=first_block, block_ranks=cut.block_ranks
            )
            _for_each_tile(read, multiply, first_m, row_programs, tiles=table_MX.shape[0] - 1)


def _dot_over_inputs(x_TD, a_RD, rows, masks, *, first_step, steps: int, block_k: int) -> jax.Array:
    """`x @ A^T` over some steps of the input columns, `[t, r]` float32; rows and masks of both."""
    D = x_TD.shape[1]

    def load(ref, row, mask, at_d):
        if D % (steps * block_k):  # the last split has steps of less, or of nothing
            mask = mask & (at_d < D)[None, :]
        return plgpu.load(ref.at[row, at_d[None, :]], mask=mask, other=0)

    def step(n, h_tr):
        at_d = (first_step + n) * block_k + jnp.arange(block_k)
        x_td = load(x_TD, rows[0], masks[0], at_d)
        a_rd = load(a_RD, rows[1], masks[1], at_d)
        return h_tr + dot(x_td, a_rd.astype(x_td.dtype), contract=(1, 1))

    zeros_tr = jnp.zeros((rows[0].shape[0], rows[1].shape[0]), jnp.float32)
    return jax.lax.fori_loop(0, steps, step, zeros_tr)


def _expand(y_TE, h_UC, pools, tables, layer, *, columns, tile: LoraTile) -> jax.Array:
    """Launches the expand, in place on `y_TE`."""
    cut = tile.expand
    body = functools.partial(
        _expand_body,
        columns=columns,
        pages=tuple(layer_pages(pool) for pool in pools),
        block_rows=tile.block_rows,
        cut=cut,
    )
    blocks = sum(pl.cdiv(pool.b_RE.shape[1], cut.block_columns) for pool in pools)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(y_TE.shape, y_TE.dtype),
        grid=(blocks, min(tile.row_programs, tables[0].shape[0] - 1)),
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        input_output_aliases={0: 0},
        name="lora_expand",
    )(y_TE, layer, tables, h_UC, tuple(pool.b_RE for pool in pools))


def _expand_body(
    y_TE, layer, tables, h_UC, b_refs, out_TE, *, columns, pages, block_rows, cut: ExpandTile
):
    T, list_ranks = y_TE.shape[0], h_UC.shape[1] // len(b_refs)
    any_block, first_m = (pl.program_id(axis) for axis in range(2))
    row_programs, first_block = pl.num_programs(1), 0
    for i, (table_MX, b_RE) in enumerate(zip(tables, b_refs, strict=True)):
        block = any_block - first_block
        blocks = pl.cdiv(b_RE.shape[1], cut.block_columns)
        first_block += blocks

        def multiply(of: TileRow, m, *, i=i, table_MX=table_MX, b_RE=b_RE, block=block):
            row_t, in_tile_t = _rows(of, block_rows=block_rows)
            at_e = block * cut.block_columns + jnp.arange(cut.block_columns)
            in_part_e = at_e < b_RE.shape[1]
            y_at = (row_t[:, None], (columns[i] + at_e)[None, :])
            y_mask_te = in_tile_t[:, None] & in_part_e[None, :]

            def multiply_ranks(k, carry):
                page_r, sum_te = carry
                next_page_r = _page_ids(table_MX, m, k + 1, block_ranks=cut.block_ranks)
                rank_r, in_list_r = _ranks(of, k, block_ranks=cut.block_ranks)
                row_r = pool_rows(page_r, rank_r, layer=layer, pages=pages[i])
                mask_tr = in_tile_t[:, None] & in_list_r[None, :]
                h_tr = _sum_of_splits(h_UC, row_t, i * list_ranks + rank_r, mask_tr, T=T)
                b_re = plgpu.load(
                    b_RE.at[row_r[:, None], at_e[None, :]],
                    mask=in_list_r[:, None] & in_part_e[None, :],
                    other=0,
                )
                h_tr, b_re = h_tr.astype(y_TE.dtype), b_re.astype(y_TE.dtype)
                return next_page_r, sum_te + dot(h_tr, b_re, contract=(1, 0))

            @pl.when(of.pages > 0)
            def _():
                # Loaded first, for its latency; added last, in the layout in which it is stored.
                y_te = plgpu.load(y_TE.at[*y_at], mask=y_mask_te, other=0)
                steps = pl.cdiv(of.pages * PAGE_RANKS, cut.block_ranks)
                zeros_te = jnp.zeros(y_te.shape, jnp.float32)
                _, sum_te = jax.lax.fori_loop(0, steps, multiply_ranks, (of.page_r, zeros_te))
                y_te = (y_te.astype(jnp.float32) + sum_te).astype(out_TE.dtype)
                plgpu.store(out_TE.at[*y_at], y_te, mask=y_mask_te)

        @pl.when((block >= 0) & (block < blocks))
        def _(multiply=multiply, table_MX=table_MX):
            read = functools.partial(_read, table_MX, block=0, block_ranks=cut.block_ranks)
            _for_each_tile(read, multiply, first_m, row_programs, tiles=table_MX.shape[0] - 1)


def _sum_of_splits(h_UC, row_t, at_r, mask_tr, *, T: int) -> jax.Array:
    """The partial sums of T rows each, added up in order: `[t, r]`."""
    splits = h_UC.shape[0] // T
    h_utr = [  # unrolled, so that all loads are in flight
        plgpu.load(h_UC.at[(u * T + row_t)[:, None], at_r[None, :]], mask=mask_tr, other=0)
        for u in range(splits)
    ]
    return functools.reduce(jnp.add, h_utr)


def _for_each_tile(read, do, m, programs, *, tiles: int) -> None:
    """Runs `do(tile, m)` for row tile m and every `programs`-th after it; `read(m)` reads one."""
    if tiles <= programs:  # one each: nothing waits for the bounds of a loop
        do(read(m), m)
        return

    def step(carry):
        of, m = carry
        do(of, m)
        m = jnp.minimum(m + programs, tiles)
        return read(m), m

    first = read(m)
    # Of the first, so that the last turn does not wait for another row of the table.
    jax.lax.while_loop(lambda carry: carry[1] < first.in_use, step, (first, m))


def _read(table_MX, m, *, block, block_ranks: int) -> TileRow:
    numbers = [table_MX[m, column] for column in range(len(TileRow._fields) - 1)]
    return TileRow._make([*numbers, _page_ids(table_MX, m, block, block_ranks=block_ranks)])


def _page_ids(table_MX, m, k, *, block_ranks: int) -> jax.Array:
    """Page of each rank of block k of tile m's list."""
    at_r = k * (block_ranks // PAGE_RANKS) + jnp.arange(block_ranks) // PAGE_RANKS
    return plgpu.load(table_MX.at[m, TILE_FIELDS + at_r])


def _rows(of: TileRow, *, block_rows: int):
    """The rows of a block, and which of them the tile has."""
    i_t = jnp.arange(block_rows)
    return of.first + i_t, i_t < of.rows


def _ranks(of: TileRow, k, *, block_ranks: int):
    """Of block k of a tile's list: places in the list, and which of them exist."""
    rank_r = k * block_ranks + jnp.arange(block_ranks)
    return rank_r, rank_r < of.pages * PAGE_RANKS


def pool_rows(page_r, rank_r, *, layer, pages: int) -> jax.Array:
    """Where ranks lie in a pool of so many pages a layer."""
    return (layer[...] * pages + page_r) * PAGE_RANKS + rank_r % PAGE_RANKS


def layer_pages(pool: LoraPool) -> int:
    """Pages of one layer."""
    return pool.a_RD.shape[0] // (pool.scale_LS.shape[0] * PAGE_RANKS)


def dot(a, b, *, contract: tuple[int, int]) -> jax.Array:
    # Without the precision, Triton would round float32 to 10 bits first.
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
