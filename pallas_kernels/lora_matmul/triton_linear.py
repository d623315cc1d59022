"""A base product and the LoRA expand of all its parts in one launch, for few rows of input.

    y_TE = x_TD @ w_DE;  y_TE[t] += (sum over u of h_UC[u * T + t, ranks]) @ B_RE[ranks]

In a decode, launches cost more than what most adapters add, so that the expand rides with the base
product: a program has some columns for all rows, streams its columns of w, and then adds those of
B, row tile by row tile. Both accumulate in float32, in a fixed order, and are rounded once
together. The shrink goes before as a launch of its own, see `triton`.

M row tiles, P parts, Q pages of a list, X rows of numbers about rows, U splits * T rows of partial
sums, C rank columns of all parts; other letters as in `api` and `layout`. Lower case is one block:
t rows (all of them), d input columns, r ranks, e output columns; u is one split.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lora_matmul import triton
from pallas_kernels.lora_matmul.layout import PAGE_RANKS, LoraPool, RowTiles
from pallas_kernels.lora_matmul.tiles import LoraTile
from pallas_kernels.lora_matmul.tiles_linear import (
    MAX_SPLITS,
    LinearTile,
    block_rows,
    linear_tile,
    refusals,
)


# Under a jit of its own for the reason of `triton.lora_matmul`.
@functools.partial(jax.jit, static_argnames=("columns", "tile", "cut"))
def lora_linear(
    x_TD: jax.Array,
    w_DE: jax.Array,
    pools: tuple[LoraPool, ...],
    tiles: RowTiles,
    layer: jax.Array,
    *,
    columns: tuple[int, ...],
    tile: LoraTile,
    cut: LinearTile | None = None,
) -> jax.Array:
    """See `api.lora_linear`, which has checked the shapes; `columns` are the parts' first ones."""
    (T, D), E = x_TD.shape, w_DE.shape[1]
    itemsize = x_TD.dtype.itemsize
    cut = cut or linear_tile(width=D, columns=E, itemsize=itemsize)
    if faults := refusals(cut, rows=T, itemsize=itemsize):
        raise ValueError(f"{cut} is not legal: " + "; ".join(faults))
    splits = min(tile.shrink.splits, MAX_SPLITS)
    tile = dataclasses.replace(tile, shrink=dataclasses.replace(tile.shrink, splits=splits))
    h_UC, tables = _shrink(x_TD, pools, tiles, layer, tile=tile, block_ranks=cut.block_ranks)
    rows_XT, page_XQ = _lists(tables, tiles, T=T, ranks=h_UC.shape[1] // len(pools))
    segments = _segments(pools, columns, E)
    body = functools.partial(
        _body, segments=segments, pages=tuple(triton.layer_pages(pool) for pool in pools), cut=cut
    )
    programs = sum(pl.cdiv(s.stop - s.start, cut.block_columns) for s in segments)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((T, E), x_TD.dtype),
        grid=(programs,),
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        name="lora_linear",
    )(layer, x_TD, w_DE, rows_XT, page_XQ, h_UC, tuple(pool.b_RE for pool in pools))


def _shrink(x_TD, pools, tiles: RowTiles, layer, *, tile: LoraTile, block_ranks: int):
    """Launches the shrink. Returns its partial sums, and the tables of the parts' row tiles."""
    triton.check(x_TD, x_TD, tiles, tile)
    most_pages = min(triton.MAX_RANK // PAGE_RANKS, max(p.page_SW.shape[1] for p in pools))
    block_pages = max(tile.shrink.block_ranks, block_ranks) // PAGE_RANKS
    list_pages = pl.cdiv(2 * most_pages, block_pages) * block_pages
    width = triton.TILE_FIELDS + list_pages + block_pages * tile.shrink.rank_programs
    tables = tuple(triton.rank_table(p, tiles, most_pages=most_pages, width=width) for p in pools)
    list_ranks = list_pages * PAGE_RANKS
    return triton.shrink(x_TD, pools, tables, layer, list_ranks=list_ranks, tile=tile), tables


def _lists(tables: Sequence[jax.Array], tiles: RowTiles, *, T: int, ranks: int):
    """What the kernel asks about rows and about row tiles; XLA makes it once a step.

    Returns:
      rows_XT: `[1 + P, T]` int32, each row's tile, -1 for none, and how many pages its list has in
        each part.
      page_XQ: `[P * M, Q]` int32, page ids of each tile's list in each part, then page 0: zeros.
    """
    M, Q = tiles.first_M.shape[0], ranks // PAGE_RANKS
    pages_at = triton.TileRow._fields.index("pages")
    pages_PM = jnp.stack([table_MX[:M, pages_at] for table_MX in tables])
    m_M, after_MT = jnp.arange(M), jnp.arange(T) - tiles.first_M[:, None]
    mine_MT = (after_MT >= 0) & (after_MT < tiles.len_M[:, None]) & (m_M < tiles.count)[:, None]
    tile_T = jnp.max(jnp.where(mine_MT, m_M[:, None], -1), axis=0)
    pages_PT = jnp.max(jnp.where(mine_MT, pages_PM[:, :, None], 0), axis=1)
    page_PMQ = jnp.stack([table_MX[:M, triton.TILE_FIELDS :][:, :Q] for table_MX in tables])
    page_PMQ = jnp.where(jnp.arange(Q) < pages_PM[:, :, None], page_PMQ, 0)
    return jnp.concatenate([tile_T[None], pages_PT]), page_PMQ.reshape(-1, Q)


class _Segment(NamedTuple):
    """Columns of one part, or of none (-1)."""

    start: int
    stop: int
    part: int


def _segments(pools: Sequence[LoraPool], columns: Sequence[int], E: int) -> list[_Segment]:
    """All columns, in order."""
    found, stop = [], 0
    for i in sorted(range(len(pools)), key=columns.__getitem__):
        if columns[i] > stop:
            found.append(_Segment(stop, columns[i], -1))
        stop = columns[i] + pools[i].b_RE.shape[1]
        found.append(_Segment(columns[i], stop, i))
    return [*found, _Segment(stop, E, -1)] if stop < E else found


def _body(
    layer, x_TD, w_DE, rows_XT, page_XQ, h_UC, b_refs, y_TE, *, segments, pages, cut: LinearTile
):
    part, column, stop = _place(segments, block_columns=cut.block_columns)
    row_t, at_e = jnp.arange(block_rows(x_TD.shape[0])), column + jnp.arange(cut.block_columns)
    is_row_t, is_column_e = row_t < x_TD.shape[0], at_e < stop
    lists = _Lists(rows_XT, page_XQ, h_UC, jnp.maximum(part, 0), len(b_refs), cut.block_ranks)
    # Loaded before the product and used after it: only B is waited for then.
    tile_t, pages_t, h_utr = *lists.of_rows(row_t, is_row_t), lists.sums(0, row_t, is_row_t)
    y_te = _product(x_TD, w_DE, row_t, at_e, is_row_t, is_column_e, block_k=cut.block_k)
    blocks = pl.cdiv(jnp.max(pages_t) * PAGE_RANKS, cut.block_ranks)
    count, rank_r = jnp.max(tile_t) + 1, jnp.arange(cut.block_ranks)
    for i, b_RE in enumerate(b_refs):
        at_part_e = at_e - next(s.start for s in segments if s.part == i)

        def multiply_ranks(k, carry, *, i=i, b_RE=b_RE, at_part_e=at_part_e):
            y_te, h_utr = carry
            next_h_utr = lists.sums(k + 1, row_t, is_row_t)
            in_list_tr = (k * cut.block_ranks + rank_r)[None, :] < (pages_t * PAGE_RANKS)[:, None]
            # The shrink leaves what is in no list unwritten.
            h_tr = jnp.where(in_list_tr, functools.reduce(jnp.add, h_utr), 0).astype(x_TD.dtype)

            def add_tile(m, y_te):
                page_r = lists.pages(m, k)
                row_r = triton.pool_rows(page_r, rank_r, layer=layer, pages=pages[i])
                b_at = b_RE.at[row_r[:, None], at_part_e[None, :]]
                b_re = plgpu.load(b_at, mask=is_column_e[None, :], other=0).astype(h_tr.dtype)
                h_of_tile_tr = jnp.where((tile_t == m)[:, None], h_tr, 0)
                return y_te + triton.dot(h_of_tile_tr, b_re, contract=(1, 0))

            return jax.lax.fori_loop(0, count, add_tile, y_te), next_h_utr

        trips = jnp.where(part == i, blocks, 0)
        y_te, h_utr = jax.lax.fori_loop(0, trips, multiply_ranks, (y_te, h_utr))
    y_at = y_TE.at[row_t[:, None], at_e[None, :]]
    plgpu.store(y_at, y_te.astype(y_TE.dtype), mask=is_row_t[:, None] & is_column_e[None, :])


def _place(segments: Sequence[_Segment], *, block_columns: int):
    """This program's part, its first column, and where its segment ends."""
    program, first = pl.program_id(0), 0
    part, column, stop = (jnp.int32(0) for _ in range(3))
    for s in segments:
        here = program >= first
        part = jnp.where(here, s.part, part)
        column = jnp.where(here, s.start + (program - first) * block_columns, column)
        stop = jnp.where(here, s.stop, stop)
        first += pl.cdiv(s.stop - s.start, block_columns)
    return part, column, stop


class _Lists(NamedTuple):
    """The rank lists of one of so many parts, as references of a kernel."""

    rows_XT: Any
    page_XQ: Any
    h_UC: Any
    part: jax.Array
    parts: int
    block_ranks: int

    def of_rows(self, row_t, is_row_t):
        """Each row's tile, -1 for none, and how many pages its list has."""
        tile_t = plgpu.load(self.rows_XT.at[0, row_t], mask=is_row_t, other=-1)
        return tile_t, plgpu.load(self.rows_XT.at[1 + self.part, row_t], mask=is_row_t, other=0)

    def pages(self, m, k) -> jax.Array:
        """Page of each rank of block k of tile m's list; page 0 after its end."""
        first_m = self.part * (self.page_XQ.shape[0] // self.parts)
        at_q = k * (self.block_ranks // PAGE_RANKS) + jnp.arange(self.block_ranks) // PAGE_RANKS
        return plgpu.load(self.page_XQ.at[first_m + m, at_q])

    def sums(self, k, row_t, is_row_t) -> tuple[jax.Array, ...]:
        """Each split's sums of block k of each row's list, `[t, r]`; zeros if there is none."""
        T, list_ranks = self.rows_XT.shape[1], self.h_UC.shape[1] // self.parts
        list_r = k * self.block_ranks + jnp.arange(self.block_ranks)
        at_r, mask_tr = self.part * list_ranks + list_r, is_row_t[:, None] & (list_r < list_ranks)
        return tuple(  # unrolled, so that all loads are in flight
            plgpu.load(self.h_UC.at[(u * T + row_t)[:, None], at_r[None, :]], mask=mask_tr, other=0)
            for u in range(self.h_UC.shape[0] // T)
        )


def _product(x_TD, w_DE, row_t, at_e, is_row_t, is_column_e, *, block_k: int) -> jax.Array:
    """`x @ w` over all input columns, `[t, e]` float32."""
    D = x_TD.shape[1]

    def step(n, y_te):
        at_d = n * block_k + jnp.arange(block_k)
        x_mask_td, w_mask_de = is_row_t[:, None], is_column_e[None, :]
        if D % block_k:
            x_mask_td, w_mask_de = x_mask_td & (at_d < D)[None, :], w_mask_de & (at_d < D)[:, None]
        x_td = plgpu.load(x_TD.at[row_t[:, None], at_d[None, :]], mask=x_mask_td, other=0)
        w_de = plgpu.load(w_DE.at[at_d[:, None], at_e[None, :]], mask=w_mask_de, other=0)
        return y_te + triton.dot(x_td, w_de, contract=(1, 0))

    zeros_te = jnp.zeros((row_t.shape[0], at_e.shape[0]), jnp.float32)
    return jax.lax.fori_loop(0, pl.cdiv(D, block_k), step, zeros_te)
