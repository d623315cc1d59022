"""Tiles of the LoRA kernels for a device: measured ones where there are any, computed ones else."""

import dataclasses
import functools
import math

from pallas_kernels.lora_matmul import tiles
from pallas_kernels.lora_matmul.tiles import LoraTile, fitted, lora_tile, refusals
from pallas_kernels.tuning.table import Entry, Key, Segments, Table, TileKind, path_of

OP = "lora"
ITEM_BYTES = 2  # tiles are measured in bfloat16, and serve float16


def _height(tile: LoraTile) -> int:
    return tile.block_rows


KINDS = {
    OP: TileKind(
        type=LoraTile,
        height=_height,
        refusals=functools.partial(refusals, itemsize=ITEM_BYTES),
    )
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
    height = known.height(OP, tokens=rows, segments=segments) if (known := table(device)) else None
    return height or tiles.block_rows(rows)


def lora_tile_for(key: Key, *, block_rows: int, itemsize: int, device: str) -> LoraTile:
    """Returns the tile for a shape whose row tiles have a height.

    Args:
      key: shape and rows of a call, and how many adapters it may meet.
      block_rows: height, a power of two of at least 16.
      itemsize: bytes of an element of x and y; nothing was measured for 4.
      device: `jax.Device.device_kind`.
    """
    if itemsize == ITEM_BYTES and (known := table(device)) is not None:
        entry = known.nearest(key, height=block_rows)
        if entry is not None:
            return at_rows(entry, key.tokens)
    return computed_tile(key, block_rows=block_rows, itemsize=itemsize, device=device)


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


def at_rows(entry: Entry[LoraTile], rows: int) -> LoraTile:
    """The tile of an entry for another number of rows, to which `row_programs` is proportional."""
    programs = math.ceil(entry.tile.row_programs * rows / entry.key.tokens)
    return dataclasses.replace(entry.tile, row_programs=programs)
