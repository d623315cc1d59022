"""Tiles of the LoRA kernels for a device: measured ones where there are any, computed ones else."""

import dataclasses
import functools
import math
from typing import Any

from pallas_kernels.lora_matmul import tiles, tiles_linear
from pallas_kernels.lora_matmul.tiles import (
    LoraTile,
    fitted,
    for_usual_ranks,
    lora_tile,
    multiprocessors,
    refusals,
)
from pallas_kernels.lora_matmul.tiles_linear import MAX_ROWS, LinearTile, linear_tile
from pallas_kernels.tuning.search import replaced
from pallas_kernels.tuning.table import Entry, Key, Segments, Table, TileKind, path_of

LORA, LINEAR = "lora", "linear"  # operators: shrink and expand, and all of a product in one launch
ITEM_BYTES = 2  # tiles are measured in bfloat16, and serve float16


def _height(tile: LoraTile) -> int:
    return tile.block_rows


def _linear_height(tile: LinearTile) -> int:
    return tile.tile_rows


def linear_refusals(tile: LinearTile) -> list[str]:
    """Rules that a tile breaks at any number of rows: it is fitted to those of a call."""
    return tiles_linear.refusals(tile, rows=1, itemsize=ITEM_BYTES)


KINDS: dict[str, TileKind] = {
    LORA: TileKind(
        type=LoraTile,
        height=_height,
        refusals=functools.partial(refusals, itemsize=ITEM_BYTES),
    ),
    LINEAR: TileKind(type=LinearTile, height=_linear_height, refusals=linear_refusals),
}


@functools.cache
def table(device: str) -> Table | None:
    """The table that is shipped for a `jax.Device.device_kind`, or None.

    Raises:
      TableError: there is one, but it cannot be used.
    """
    path = path_of(device)
    return Table.read(path, device=device, kinds=KINDS) if path.exists() else None


def block_rows(rows: int, *, segments: Segments, device: str) -> int:
    """Returns the height of row tiles for a step of so many rows."""
    op = LINEAR if rows <= MAX_ROWS else LORA
    height = known.height(op, tokens=rows, segments=segments) if (known := table(device)) else None
    return height or tiles.block_rows(rows)


def lora_tile_for(key: Key, *, block_rows: int, itemsize: int, device: str) -> LoraTile:
    """Returns the tile for a shape whose row tiles have a height.

    Args:
      key: shape and rows of a call, and how many adapters it may meet.
      block_rows: height, a power of two of at least 16.
      itemsize: bytes of an element of x and y; nothing was measured for 4.
      device: `jax.Device.device_kind`.
    """
    tile = _measured(key, height=block_rows, itemsize=itemsize, device=device)
    if tile is None:
        tile = computed_tile(key, block_rows=block_rows, itemsize=itemsize, device=device)
    return for_usual_ranks(tile)


def linear_tile_for(
    key: Key, *, parts: int, tile_rows: int, itemsize: int, device: str
) -> LinearTile:
    """Returns the tile for a shape of so many parts; see `lora_tile_for`."""
    tile = _measured(key, height=tile_rows, itemsize=itemsize, device=device) or linear_tile(
        rows=key.tokens,
        width=key.width,
        columns=key.columns,
        parts=parts,
        itemsize=itemsize,
        tile_rows=tile_rows,
        device=device,
    )
    if parts == 1:
        # Searches meet no mixture. Its lists have two blocks: of the adapter that is added, and of
        # the one that is subtracted. One after the other they outlast the product of one linear.
        shared = replaced(tile, "shrink.rank_programs", max(2, tile.shrink.rank_programs))
        if _programs(shared, key) <= multiprocessors(device):
            tile = shared
    return tiles_linear.fitted(tile, rows=key.tokens, itemsize=itemsize)


def _programs(tile: LinearTile, key: Key) -> int:
    """Of a launch; those that find no multiprocessor of their own make the others wait."""
    row_programs = min(tile.row_programs, key.tokens)
    of_shrink = row_programs * tile.shrink.splits * tile.shrink.rank_programs
    return of_shrink + math.ceil(key.columns / tile.block_columns) * tile.splits


def _measured(key: Key, *, height: int, itemsize: int, device: str) -> Any:
    """The tile of the nearest entry, or None."""
    if itemsize != ITEM_BYTES or (known := table(device)) is None:
        return None
    entry = known.nearest(key, height=height)
    return None if entry is None else at_rows(entry, key.tokens)


def computed_tile(
    key: Key, *, block_rows: int, device: str, itemsize: int = ITEM_BYTES
) -> LoraTile:
    """The tile without a table, for row tiles of any height."""
    computed = functools.partial(
        lora_tile, width=key.width, columns=key.columns, itemsize=itemsize, device=device
    )
    tile = computed(rows=key.tokens)
    if tile.block_rows != block_rows:
        # A tile is computed for the height that suits its rows; another height is that of others.
        heights = {tiles.block_rows(rows): rows for rows in (256, 128, 64, key.tokens)}
        like = max((height for height in heights if height <= block_rows), default=min(heights))
        tile = dataclasses.replace(
            computed(rows=heights[like]),
            block_rows=block_rows,
            row_programs=tile.row_programs,
        )
    # Taller row tiles take more shared memory.
    return fitted(tile, itemsize=itemsize)


def at_rows[Tile: (LoraTile, LinearTile)](entry: Entry[Tile], rows: int) -> Tile:
    """The tile of an entry for another number of rows, to which `row_programs` is proportional."""
    programs = math.ceil(entry.tile.row_programs * rows / entry.key.tokens)
    return dataclasses.replace(entry.tile, row_programs=programs)
