"""What `triton_linear` reads about rows, row tiles and rank lists, made by one small kernel a step.

A list is what a row adds and subtracts in a part: pages of 16 ranks. Neighbouring row tiles of one
adapter have one list together. Lists are multiplied in blocks of ranks, and a block costs a wait
for B and a product, however few of its ranks are used. So lists that fit a block share it, each in
a power of two of pages, the largest first: what adapters take follows the sum of their ranks. A
list that is longer has blocks of its own.

XLA would make the same in a dozen kernels, each for longer than this one takes; it runs this once
for all layers, too. One program has one part. Lower case is what it holds, padded to powers of two:
m row tiles, j the same along another axis, t rows, x numbers of a table's row, q pages of a list.
K blocks of the longest list, F numbers about a list, other letters as in `rank_tables`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lora_matmul.layout import PAGE_RANKS, LoraPool, RowTiles
from pallas_kernels.lora_matmul.rank_tables import TILE_FIELDS, TileRow, list_room
from pallas_kernels.lora_matmul.tiles import power_of_two

LIST_FIELDS = 2  # numbers about a list before those of its blocks
WARPS = 8


class ListArrays(NamedTuple):
    """The lists of a step, all in int32; arrays, or references to them in a kernel.

    Attributes:
      list_T: each row's list, by the row tile that it begins with; -1 for none.
      list_MF: `[P * M, LIST_FIELDS + K + 1]`, of the list that a row tile begins in a part: its
        pages, where in its first block it begins, in pages, and which of the blocks for the lists'
        first ones has its first, and so on, -1 past its end.
      page_MQ: `[P * K * M, block pages]`, page ids of blocks, page 0 where no list is. A part has M
        blocks for the lists' first ones, then M for their second ones, and so on; only those in use
        are looked at.
      blocks_N: `[P * K + 1]`, how many are in use; the last is anything.
    """

    list_T: Any
    list_MF: Any
    page_MQ: Any
    blocks_N: Any

    @classmethod
    def shapes(cls, *, P: int, M: int, K: int, block_pages: int) -> "ListArrays":
        """Of P parts, M row tiles, and lists of at most K blocks."""
        int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        return cls(
            list_T=int32((M,)),  # there are as many row tiles as rows
            list_MF=int32((P * M, LIST_FIELDS + K + 1)),
            page_MQ=int32((P * K * M, block_pages)),
            blocks_N=int32((P * K + 1,)),
        )


class RankLists(NamedTuple):
    """What the kernel takes.

    Attributes:
      tables: of each part, `[M + 1, X]` int32 as in `rank_tables`; the last row is anything.
      arrays: the lists.
      ranks: that a row's sums of a part have room for.
    """

    tables: tuple[jax.Array, ...]
    arrays: ListArrays
    ranks: int


def rank_lists(
    pools: Sequence[LoraPool],
    tiles: RowTiles,
    *,
    block_ranks: int,
    shrink_ranks: int,
    rank_programs: int,
) -> RankLists:
    """Lays out the lists of all parts.

    Args:
      pools: of the parts.
      tiles: the row tiles, of few rows.
      block_ranks: of a block, a power of two of pages.
      shrink_ranks: of a block of the shrink, which reads the tables.
      rank_programs: of the shrink that share a list in turn.
    """
    most_pages, list_pages, width = list_room(
        pools, block_ranks=max(block_ranks, shrink_ranks), rank_programs=rank_programs
    )
    M, P, block_pages = tiles.first_M.shape[0], len(pools), block_ranks // PAGE_RANKS
    K = list_pages // block_pages

    def body(tile_refs, page_refs, pages_refs, table_refs, lists):
        for part in range(P):
            layout = _Layout(
                part=part,
                most_pages=most_pages,
                list_pages=list_pages,
                block_pages=block_pages,
                tiles=tile_refs,
                page_SW=page_refs[part],
                pages_S=pages_refs[part],
            )
            write = functools.partial(layout.write, table_refs[part], lists)
            pl.when(pl.program_id(0) == part)(write)

    tables, arrays = pl.pallas_call(
        body,
        out_shape=(
            (jax.ShapeDtypeStruct((M + 1, width), jnp.int32),) * P,
            ListArrays.shapes(P=P, M=M, K=K, block_pages=block_pages),
        ),
        grid=(P,),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        name="lora_lists",
    )(
        tiles,
        tuple(pool.page_SW for pool in pools),
        tuple(pool.pages_S for pool in pools),
    )
    # A list that begins late in its block leaves a whole block of the shrink behind it.
    return RankLists(tables, arrays, ranks=list_pages * PAGE_RANKS + shrink_ranks)


class _Layout(NamedTuple):
    """What a program needs to lay out the lists of a part.

    Attributes:
      part: which.
      most_pages: of an adapter.
      list_pages: room of a list.
      block_pages: of a block.
      tiles: `RowTiles` of references.
      page_SW, pages_S: the pool's.
    """

    part: int
    most_pages: int
    list_pages: int
    block_pages: int
    tiles: Any
    page_SW: Any
    pages_S: Any

    @property
    def row_tiles(self) -> int:
        """M."""
        return self.tiles.first_M.shape[0]

    @property
    def most_blocks(self) -> int:
        """K."""
        return self.list_pages // self.block_pages

    def write(self, table_MX, lists: ListArrays) -> None:
        tiles, M = self.tiles, self.row_tiles
        self._clear(lists.page_MQ)
        m_m = jnp.arange(power_of_two(M))
        is_tile_m, in_use_m = m_m < M, m_m < tiles.count[...]
        plus_m = plgpu.load(tiles.plus_M.at[m_m], mask=is_tile_m, other=-1)
        minus_m = plgpu.load(tiles.minus_M.at[m_m], mask=is_tile_m, other=-1)
        len_m = plgpu.load(tiles.len_M.at[m_m], mask=is_tile_m, other=0)
        plus_pages_m = self._pages_of(plus_m, in_use_m)

        above_m = plgpu.load(tiles.plus_M.at[m_m - 1], mask=is_tile_m & (m_m > 0), other=-1)
        begins_m = in_use_m & ((m_m == 0) | (plus_m != above_m))
        begun_mj = begins_m[None, :] & (m_m[None, :] <= m_m[:, None])
        list_m = jnp.max(jnp.where(begun_mj, m_m[None, :], -1), axis=1)
        pages_m = plus_pages_m + self._pages_of(minus_m, in_use_m)
        own_m = jnp.where(begins_m, pages_m, 0)
        first_m = self._first_places(own_m, m_m)
        place_mj = jnp.where(list_m[:, None] == m_m[None, :], first_m[None, :], 0)
        of = TileRow(
            first=plgpu.load(tiles.first_M.at[m_m], mask=is_tile_m, other=-1),
            rows=jnp.where(m_m < tiles.count[...] + tiles.idle[...], len_m, 0),
            pages=pages_m,
            plus_pages=plus_pages_m,
            plus=jnp.maximum(plus_m, 0),
            minus=jnp.maximum(minus_m, 0),
            in_use=jnp.full_like(m_m, tiles.count[...]),
            all_tiles=jnp.full_like(m_m, tiles.count[...] + tiles.idle[...]),
            place=jax.lax.rem(jnp.sum(place_mj, axis=1), self.block_pages),
            page_r=pages_m,  # pages follow the numbers
        )
        self._write_table(table_MX, of, m_m)
        if self.part == 0:
            self._write_rows(lists.list_T, of, list_m, in_use_m)
        self._write_lists(lists, own_m, first_m, m_m)
        plgpu.debug_barrier()  # after which all is clear
        self._write_pages(lists.page_MQ, of, own_m, first_m, m_m)

    def _pages_of(self, slot_m, in_use_m) -> jax.Array:
        is_slot_m = in_use_m & (slot_m >= 0)
        pages_m = plgpu.load(self.pages_S.at[slot_m], mask=is_slot_m, other=0)
        return jnp.minimum(pages_m, self.most_pages)

    def _first_places(self, own_m, m_m) -> jax.Array:
        """The place of each list's first page among those of all first blocks, in pages.

        The largest first: all of them begin at a multiple of what they take.
        """
        room_m = self._room(own_m)
        mine, others = room_m[:, None], room_m[None, :]
        earlier_mj = (others == mine) & (m_m[None, :] < m_m[:, None])
        return jnp.sum(jnp.where((others > mine) | earlier_mj, others, 0), axis=1)

    def _room(self, pages_m) -> jax.Array:
        """Pages of its first block that a list takes: the next power of two."""
        room_m, half = jnp.minimum(pages_m, 1), 1
        while half < self.block_pages:
            room_m = jnp.where(pages_m > half, 2 * half, room_m)
            half *= 2
        return room_m

    def _has(self, own_m, k_x) -> jax.Array:
        """`[m, x]` 1 where a list has a k-th block, else 0."""
        return (own_m[:, None] > (k_x * self.block_pages)[None, :]).astype(jnp.int32)

    def _page_ids(self, of: TileRow, q_x) -> jax.Array:
        """`[m, x]` page q of each row tile's list; 0 beside it."""
        of_plus_mx = q_x[None, :] < of.plus_pages[:, None]
        slot_mx = jnp.where(of_plus_mx, of.plus[:, None], of.minus[:, None])
        at_mx = jnp.where(of_plus_mx, q_x[None, :], q_x[None, :] - of.plus_pages[:, None])
        mask_mx = (q_x >= 0)[None, :] & (q_x[None, :] < of.pages[:, None])
        return plgpu.load(self.page_SW.at[slot_mx, at_mx], mask=mask_mx, other=0)

    def _write_table(self, table_MX, of: TileRow, m_m) -> None:
        x_x = jnp.arange(power_of_two(table_MX.shape[1]))
        number_mx = self._page_ids(of, x_x - TILE_FIELDS)
        for column, of_tile_m in enumerate(of[:TILE_FIELDS]):
            number_mx = jnp.where(x_x[None, :] == column, of_tile_m[:, None], number_mx)
        is_tile_m, is_number_x = m_m < table_MX.shape[0] - 1, x_x < table_MX.shape[1]
        mask_mx = is_tile_m[:, None] & is_number_x[None, :]
        plgpu.store(table_MX.at[m_m[:, None], x_x[None, :]], number_mx, mask=mask_mx)

    def _write_rows(self, list_T, of: TileRow, list_m, in_use_m) -> None:
        t_t = jnp.arange(power_of_two(list_T.shape[0]))
        after_mt = t_t[None, :] - of.first[:, None]
        mine_mt = in_use_m[:, None] & (after_mt >= 0) & (after_mt < of.rows[:, None])
        list_t = jnp.max(jnp.where(mine_mt, list_m[:, None], -1), axis=0)
        plgpu.store(list_T.at[t_t], list_t, mask=t_t < list_T.shape[0])

    def _write_lists(self, lists: ListArrays, own_m, first_m, m_m) -> None:
        M, K, list_MF = self.row_tiles, self.most_blocks, lists.list_MF
        k_k = jnp.arange(power_of_two(K))
        has_mk = self._has(own_m, k_k)
        shared_m = jax.lax.div(first_m, self.block_pages)
        block_mk = jnp.where((k_k == 0)[None, :], shared_m[:, None], _before(has_mk))
        block_mk = jnp.where(has_mk > 0, block_mk, -1)
        row_m, is_tile_m = self.part * M + m_m, m_m < M
        plgpu.store(list_MF.at[row_m, 0], own_m, mask=is_tile_m)
        place_m = jax.lax.rem(first_m, self.block_pages)
        plgpu.store(list_MF.at[row_m, 1], place_m, mask=is_tile_m)
        at_mk = list_MF.at[row_m[:, None], LIST_FIELDS + k_k[None, :]]
        plgpu.store(at_mk, block_mk, mask=is_tile_m[:, None] & (k_k < K)[None, :])

        shared = pl.cdiv(jnp.sum(self._room(own_m)), self.block_pages)
        blocks_k = jnp.where(k_k == 0, shared, jnp.sum(has_mk, axis=0))
        plgpu.store(lists.blocks_N.at[self.part * K + k_k], blocks_k, mask=k_k < K)

    def _clear(self, page_MQ) -> None:
        """Makes all of the part's places free."""
        M = self.row_tiles
        m_m, q_q = jnp.arange(power_of_two(M)), jnp.arange(self.block_pages)
        zeros_mq = jnp.zeros((m_m.shape[0], q_q.shape[0]), jnp.int32)

        def clear(k, _):
            row_m = (self.part * self.most_blocks + k) * M + m_m
            at_mq = page_MQ.at[row_m[:, None], q_q[None, :]]
            plgpu.store(at_mq, zeros_mq, mask=(m_m < M)[:, None])

        jax.lax.fori_loop(0, self.most_blocks, clear, None)

    def _write_pages(self, page_MQ, of: TileRow, own_m, first_m, m_m) -> None:
        M, K = self.row_tiles, self.most_blocks
        q_q = jnp.arange(power_of_two(self.list_pages))
        k_q = jax.lax.div(q_q, self.block_pages)
        # Lists that go on have whole blocks to themselves.
        place_mq = jnp.where(
            (k_q == 0)[None, :],
            first_m[:, None] + q_q[None, :],
            _before(self._has(own_m, k_q)) * self.block_pages
            + jax.lax.rem(q_q, self.block_pages)[None, :],
        )
        mine_mq = q_q[None, :] < own_m[:, None]
        row_mq = (self.part * K + k_q)[None, :] * M + jax.lax.div(place_mq, self.block_pages)
        # Interpreted, masked elements are written as they were: not over those of others.
        row_mq = jnp.where(mine_mq, row_mq, page_MQ.shape[0])
        at_mq = page_MQ.at[row_mq, jax.lax.rem(place_mq, self.block_pages)]
        plgpu.store(at_mq, self._page_ids(of, q_q), mask=mine_mq)


def _before(number_mx) -> jax.Array:
    """The sum of those of the row tiles before."""
    return jnp.cumsum(number_mx, axis=0) - number_mx
