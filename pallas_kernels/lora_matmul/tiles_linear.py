"""Shapes of the blocks in which `triton_linear` works: a base product with its LoRA updates."""

import dataclasses
import math

from pallas_kernels.lora_matmul.tiles import (
    SHARED_MEMORY_BYTES,
    ShrinkTile,
    block_height,
    multiprocessors,
    power_of_two,
)

MAX_ROWS = 64  # above, programs read more of x than of w
MIN_PROGRAMS = 64  # fewer do not saturate an H100's memory
ONE_RANGE_ROWS = 32  # above, programs for few columns have too much of x to read each


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LinearTile:
    """How `x @ w + h @ B` is cut, for programs that have all rows, and the shrink beside it.

    Attributes:
      block_columns: output columns of a program.
      block_k: input columns of one step.
      block_ranks: ranks multiplied at once.
      tile_rows: of a block of the shrink, which has a row tile; no fewer than a tile has.
      row_programs: of the shrink along the rows, at most; each does every so many-th row tile.
      splits: ranges of the input columns, which have programs of their own; those of the first add
        what the others have.
      shrink: its cut. One launch has one number of warps and of stages.
    """

    block_columns: int
    block_k: int
    block_ranks: int
    tile_rows: int
    row_programs: int
    splits: int
    shrink: ShrinkTile

    @property
    def warps(self) -> int:
        """Of 32 threads, a program."""
        return self.shrink.warps

    @property
    def stages(self) -> int:
        """Steps whose loads are in flight."""
        return self.shrink.stages


def linear_tile(
    *,
    rows: int,
    width: int,
    columns: int,
    parts: int,
    itemsize: int,
    tile_rows: int = 16,
    device: str | None = None,
) -> LinearTile:
    """Returns a good tile for up to `MAX_ROWS` rows, whose bytes are those of the weights.

    Args:
      rows: T.
      width: D.
      columns: E, of all linears that share the input.
      parts: how many of them there are.
      itemsize: bytes of an element of x and w.
      tile_rows: of a row tile, at most; a power of two of at least 16.
      device: `jax.Device.device_kind`; an H100 when None or unknown.
    """
    count = multiprocessors(device)
    block_columns, ranges = _block_columns(rows, columns, itemsize=itemsize, count=count)
    # Of two ranges, two programs fit the memory of a multiprocessor.
    cuts = {(128, 1): (64, 5), (64, 1): (128, 5), (32, 1): (128, 7), (64, 2): (64, 5)}
    block_k, stages = cuts[block_columns, ranges]
    # The fewer sums, the less is read after the product, but programs of few columns have less time
    # for them.
    splits, most_k = 1 if block_columns == 128 else 2, power_of_two(width)
    # Programs that do not find a multiprocessor of their own make others wait, but those of a
    # second range, which share one.
    programs = math.ceil(columns / block_columns)
    spare = count * math.ceil(programs / count) - programs
    return LinearTile(
        block_columns=max(16, min(block_columns, power_of_two(columns))),
        block_k=max(16, min(block_k * 2 // itemsize, most_k)),
        block_ranks=64,
        tile_rows=tile_rows,
        row_programs=max(1, spare // (parts * splits)),
        splits=ranges,
        shrink=ShrinkTile(
            block_k=max(16, min(256 // itemsize, most_k)),
            block_ranks=64,
            rank_programs=1,
            splits=splits,
            warps=4,
            stages=stages,
        ),
    )


def _block_columns(rows: int, columns: int, *, itemsize: int, count: int) -> tuple[int, int]:
    """Output columns of a program, and ranges of the input columns."""
    if itemsize > 2:
        # Exact float32 products have no tensor cores, and in wide blocks spill their registers.
        return 32, 1
    if rows > ONE_RANGE_ROWS and MIN_PROGRAMS <= 2 * math.ceil(columns / 64) <= count:
        return 64, 2
    # The wider the blocks, the fewer programs read x.
    return next((size for size in (128, 64) if columns / size >= MIN_PROGRAMS), 32), 1


def refusals(tile: LinearTile, *, rows: int, itemsize: int) -> list[str]:
    """Returns the rules that a tile breaks, with its values; none for a legal one.

    Args:
      tile: any values.
      rows: T.
      itemsize: bytes of an element of x and w.
    """
    sizes = dict(
        block_columns=tile.block_columns,
        block_k=tile.block_k,
        block_ranks=tile.block_ranks,
        tile_rows=tile.tile_rows,
        shrink_block_k=tile.shrink.block_k,
        shrink_block_ranks=tile.shrink.block_ranks,
    )
    found = [
        f"{name}={size} is not a power of two of at least 16"
        for name, size in sizes.items()
        if size < 16 or size != power_of_two(size)
    ]
    if tile.warps not in (1, 2, 4, 8, 16):
        found.append(f"warps={tile.warps} is not 1, 2, 4, 8 or 16")
    counts = dict(
        row_programs=tile.row_programs,
        stages=tile.stages,
        splits=tile.splits,
        rank_programs=tile.shrink.rank_programs,
        shrink_splits=tile.shrink.splits,
    )
    found += [f"{name}={count} is not at least 1" for name, count in counts.items() if count < 1]
    if (needed := shared_memory_bytes(tile, rows=rows, itemsize=itemsize)) > SHARED_MEMORY_BYTES:
        found.append(
            f"it needs about {needed} bytes of shared memory, a program has {SHARED_MEMORY_BYTES}"
        )
    return found


def fitted(tile: LinearTile, *, rows: int, itemsize: int) -> LinearTile:
    """Returns a tile with fewer steps in flight, until it fits: more rows take more memory."""
    while (
        tile.stages > 1
        and shared_memory_bytes(tile, rows=rows, itemsize=itemsize) > SHARED_MEMORY_BYTES
    ):
        shrink = dataclasses.replace(tile.shrink, stages=tile.stages - 1)
        tile = dataclasses.replace(tile, shrink=shrink)
    return tile


def shared_memory_bytes(tile: LinearTile, *, rows: int, itemsize: int) -> int:
    """Returns how much a program takes at most: operands in flight, of one of three products.

    As Triton did it in jax 0.11.2; see `tiles.shared_memory_bytes` for when a stage has a buffer.
    """
    height, shrink = block_height(rows), tile.shrink

    def buffers(height: int) -> int:
        return tile.stages if height >= 64 else max(1, tile.stages - 1)

    product = (height + tile.block_columns) * tile.block_k * itemsize
    expand = tile.block_ranks * (tile.block_columns * itemsize + 4)
    h = height * tile.block_ranks * itemsize
    x_and_a = (tile.tile_rows + shrink.block_ranks) * shrink.block_k * itemsize
    return max(
        product * buffers(height),
        expand * buffers(height) + h,
        x_and_a * buffers(tile.tile_rows),
    )
