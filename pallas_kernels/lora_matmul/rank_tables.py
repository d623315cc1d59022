"""What the "triton" kernels read about row tiles: one table a part, one row a tile.

XLA makes the tables once a step, for all layers. M row tiles, X numbers about one in a part; other
letters as in `api` and `layout`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lora_matmul.layout import MAX_RANK, PAGE_RANKS, LoraPool, RowTiles


class TileRow(NamedTuple):
    """A row tile in one part, as a kernel reads it from the part's table.

    Attributes:
      first, rows: its rows; none if the tile is not in use.
      pages: in its list, 0 for none.
      plus_pages: how many of them, the first ones, are of the adapter that is added.
      plus, minus: slots of the adapter that is added, and of the one that is subtracted.
      in_use: tiles in use, the same for all.
      all_tiles: with those of rows that have nothing to add or subtract.
      place: of its list's first page in a block of ranks that it shares (`triton_lists`).
      page_r: page of each rank of the program's first block.
    """

    first: jax.Array
    rows: jax.Array
    pages: jax.Array
    plus_pages: jax.Array
    plus: jax.Array
    minus: jax.Array
    in_use: jax.Array
    all_tiles: jax.Array
    place: jax.Array
    page_r: jax.Array


TILE_FIELDS = 9  # numbers before the page ids of a row of a table: those of `TileRow`


def rank_tables(
    pools: Sequence[LoraPool], tiles: RowTiles, *, block_ranks: int, rank_programs: int
) -> tuple[tuple[jax.Array, ...], int]:
    """Returns the tables of all parts, and how many ranks a tile's list has room for.

    Args:
      pools: of the parts.
      tiles: the row tiles.
      block_ranks: most ranks that a kernel multiplies at once.
      rank_programs: that share a tile's list in turn.
    """
    most_pages, list_pages, width = list_room(
        pools, block_ranks=block_ranks, rank_programs=rank_programs
    )
    tables = tuple(_rank_table(pool, tiles, most_pages=most_pages, width=width) for pool in pools)
    return tables, list_pages * PAGE_RANKS


def list_room(
    pools: Sequence[LoraPool], *, block_ranks: int, rank_programs: int
) -> tuple[int, int, int]:
    """Returns most pages of an adapter, those that a list has room for, and a table's width; see
    `rank_tables`."""
    # A slot has room for as many pages as the pool, a list only for the highest rank: of an adapter
    # that is added, and of one that is subtracted.
    most_pages = min(MAX_RANK // PAGE_RANKS, max(pool.page_SW.shape[1] for pool in pools))
    block_pages = block_ranks // PAGE_RANKS
    list_pages = pl.cdiv(2 * most_pages, block_pages) * block_pages
    # The kernels read the page ids of a program's next block before they know if there is one.
    return most_pages, list_pages, TILE_FIELDS + list_pages + block_pages * rank_programs


def _rank_table(pool: LoraPool, tiles: RowTiles, *, most_pages: int, width: int) -> jax.Array:
    """All that the kernels ask about each row tile in a part, in one row: one load away.

    Returns `[M + 1, X]` int32: the numbers of a `TileRow`, then the page ids of the tile's list;
    after its end they are anything. Tiles that are not in use have no pages, those of no rows, and
    the last row, no rows either. The same in all layers, so that XLA makes it once a step.
    """
    m_M, all_tiles = jnp.arange(tiles.first_M.shape[0] + 1), tiles.count + tiles.idle
    in_use_M = m_M < tiles.count
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
        rows=jnp.where(m_M < all_tiles, len_M, 0),
        pages=plus_pages_M + minus_pages_M,
        plus_pages=plus_pages_M,
        plus=jnp.maximum(plus_M, 0),
        minus=jnp.maximum(minus_M, 0),
        in_use=jnp.full_like(first_M, tiles.count),
        all_tiles=jnp.full_like(first_M, all_tiles),
        place=jnp.zeros_like(first_M),
    )
    for name, of_tile_M in fields.items():
        column = TileRow._fields.index(name) - TILE_FIELDS
        table_MX = jnp.where(q_X == column, of_tile_M[:, None], table_MX)
    return table_MX


def for_each_tile(
    do, table_MX, m, programs, *, block, block_ranks: int, idle: bool = False
) -> None:
    """Runs `do(tile, m)` for row tile m and every `programs`-th after it.

    `block` is the program's first block of ranks of a tile. With `idle`, rows that have nothing to
    add or subtract have their turns, too.
    """
    tiles = table_MX.shape[0] - 1

    def read(m) -> TileRow:
        numbers = [table_MX[m, column] for column in range(len(TileRow._fields) - 1)]
        return TileRow._make([*numbers, page_ids(table_MX, m, block, block_ranks=block_ranks)])

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
    stop = first.all_tiles if idle else first.in_use
    jax.lax.while_loop(lambda carry: carry[1] < stop, step, (first, m))


def page_ids(table_MX, m, k, *, block_ranks: int) -> jax.Array:
    """Page of each rank of block k of tile m's list."""
    # Not `//` and `%`, which would be a dozen operations for the sake of negative numbers.
    at_r = k * (block_ranks // PAGE_RANKS) + jax.lax.div(jnp.arange(block_ranks), PAGE_RANKS)
    return plgpu.load(table_MX.at[m, TILE_FIELDS + at_r])


def rows_of(of: TileRow, *, block_rows: int):
    """The rows of a block, and which of them the tile has."""
    i_t = jnp.arange(block_rows)
    return of.first + i_t, i_t < of.rows


def ranks_of(of: TileRow, k, *, block_ranks: int):
    """Of block k of a tile's list: places in the list, and which of them exist."""
    rank_r = k * block_ranks + jnp.arange(block_ranks)
    return rank_r, rank_r < of.pages * PAGE_RANKS


def pool_rows(page_r, rank_r, *, layer, pages: int) -> jax.Array:
    """Where ranks lie in a pool of so many pages a layer."""
    return (layer[...] * pages + page_r) * PAGE_RANKS + jax.lax.rem(rank_r, PAGE_RANKS)
