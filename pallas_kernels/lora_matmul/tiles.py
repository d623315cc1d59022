"""Shapes of the blocks in which the "triton" kernels of the LoRA operator work."""

import dataclasses
import math

SHARED_MEMORY_BYTES = 227 * 1024  # a program's on Hopper
USUAL_RANKS = 128  # of an adapter in one linear, rarely more
# More gain nothing where a list is one block of ranks, and of two they take the shared memory of
# programs beside this one.
MOST_EXPAND_STAGES = 4

# Streaming multiprocessors by the name of the device; an unknown one gets an H100's number, which
# is never wrong: it only says how finely to cut.
_MULTIPROCESSORS = {"A100": 108, "H100 PCIe": 114, "H100": 132, "H200": 132, "B200": 148}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShrinkTile:
    """How `x @ A^T` is cut.

    Attributes:
      block_k: input columns of one step.
      block_ranks: ranks multiplied at once.
      rank_programs: that share the blocks of ranks of a row tile in turn.
      splits: into how many ranges the input columns are cut at most; their sums are added up in
        the expand, in order.
      warps: of 32 threads, a program.
      stages: steps whose loads are in flight.
    """

    block_k: int
    block_ranks: int
    rank_programs: int
    splits: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExpandTile:
    """How `h @ B` is cut; see `ShrinkTile`.

    Attributes:
      block_columns: output columns that are written at once.
      blocks: of columns, one after the other, of a program.
      block_ranks: ranks multiplied at once.
    """

    block_columns: int
    blocks: int
    block_ranks: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraTile:
    """Both kernels' cuts.

    Attributes:
      block_rows: the height of a row tile.
      row_programs: along the rows, at most; each does every so many-th row tile.
    """

    block_rows: int
    row_programs: int
    shrink: ShrinkTile
    expand: ExpandTile


def multiprocessors(device: str | None) -> int:
    """Returns how many a device has; an H100's number when None or unknown."""
    known = (count for name, count in _MULTIPROCESSORS.items() if name in (device or ""))
    return next(known, _MULTIPROCESSORS["H100"])


def block_rows(rows: int) -> int:
    """Returns a good height of row tiles for a step of so many rows."""
    # Few rows may be of many adapters; 64 are the least that Hopper's own matmul instruction takes.
    return 16 if rows < 256 else 64


def lora_tile(
    *, rows: int, width: int, columns: int, itemsize: int = 2, device: str | None = None
) -> LoraTile:
    """Returns a good tile for a shape, from what bounds it: latency, then bytes, then matmuls.

    Args:
      rows: T, at least 1.
      width: D.
      columns: E, of all linears that share the input.
      itemsize: bytes of an element of x and y.
      device: `jax.Device.device_kind`; an H100 when None or unknown.
    """
    count = multiprocessors(device)
    height = block_rows(rows)
    row_tiles = math.ceil(rows / height)
    shrink = _shrink_tile(height, row_tiles, width=width, columns=columns, multiprocessors=count)
    expand = _expand_tile(height, row_tiles, splits=shrink.splits, multiprocessors=count)
    tile = LoraTile(
        block_rows=height,
        # One for each row of a decode, as each may bring another adapter.
        row_programs=min(rows, row_tiles + 32),
        shrink=dataclasses.replace(shrink, block_k=max(16, min(128, power_of_two(width)))),
        expand=dataclasses.replace(
            expand, block_columns=max(16, min(expand.block_columns, power_of_two(columns)))
        ),
    )
    return fitted(tile, itemsize=itemsize)


def _expand_tile(height: int, row_tiles: int, *, splits: int, multiprocessors: int) -> ExpandTile:
    """Steps in flight where a program has several; sums to add up are no operands to be so."""
    if height < 64 or splits > 1:
        return ExpandTile(block_columns=128, blocks=1, block_ranks=64, warps=4, stages=1)
    # Narrow blocks, so that programs have few registers and many are in flight.
    blocks = 16 if 4 * row_tiles > multiprocessors else 8
    return ExpandTile(
        block_columns=64, blocks=blocks, block_ranks=64, warps=4, stages=MOST_EXPAND_STAGES
    )


def _shrink_tile(
    height: int, row_tiles: int, *, width: int, columns: int, multiprocessors: int
) -> ShrinkTile:
    """Programs side by side have ranks of their own rather than input columns, as far as it goes.

    Each program of the expand reads all sums of its rows again, while ranks of their own cost the
    shrink a few reads of x.
    """
    if height < 64:
        # Many small programs: one without work costs less than a nanosecond. Twice the splits
        # would cost the expand more than they spare the shrink.
        return ShrinkTile(
            block_k=128,
            block_ranks=16,
            rank_programs=8,
            splits=max(1, min(8, width // 1024)),
            warps=4,
            stages=5,
        )
    if 4 * row_tiles > multiprocessors:
        if columns > width:  # several linears fill the device
            return ShrinkTile(
                block_k=128, block_ranks=64, rank_programs=2, splits=1, warps=4, stages=3
            )
        # Where programs are few, each has a multiprocessor's shared memory to itself.
        stages = 8 if 2 * row_tiles <= multiprocessors else 4
        return ShrinkTile(
            block_k=128, block_ranks=32, rank_programs=4, splits=1, warps=4, stages=stages
        )
    # Sums cost by the columns that are expanded, and spare time by those that are summed.
    splits = max(1, min(2 * width // columns, multiprocessors // (4 * row_tiles)))
    return ShrinkTile(
        block_k=128, block_ranks=16, rank_programs=8, splits=splits, warps=4, stages=5
    )


def refusals(tile: LoraTile, *, itemsize: int) -> list[str]:
    """Returns the rules that a tile breaks, with its values; none for a legal one.

    Args:
      tile: any values.
      itemsize: bytes of an element of x and y.
    """
    shrink, expand = tile.shrink, tile.expand
    blocks = dict(
        block_rows=tile.block_rows,
        block_k=shrink.block_k,
        shrink_block_ranks=shrink.block_ranks,
        block_columns=expand.block_columns,
        expand_block_ranks=expand.block_ranks,
    )
    found = [
        f"{name}={size} is not a power of two of at least 16"
        for name, size in blocks.items()
        if size < 16 or size != power_of_two(size)
    ]
    counts = dict(
        row_programs=tile.row_programs,
        rank_programs=shrink.rank_programs,
        splits=shrink.splits,
        blocks=expand.blocks,
    )
    for kernel, cut in (("shrink", shrink), ("expand", expand)):
        if cut.warps not in (1, 2, 4, 8, 16):
            found.append(f"{kernel} warps={cut.warps} is not 1, 2, 4, 8 or 16")
        counts[f"{kernel} stages"] = cut.stages
    found += [f"{name}={count} is not at least 1" for name, count in counts.items() if count < 1]
    for name, needed in shared_memory_bytes(tile, itemsize=itemsize).items():
        if needed > SHARED_MEMORY_BYTES:
            found.append(
                f"{name} needs about {needed} bytes of shared memory, "
                f"a program has {SHARED_MEMORY_BYTES}"
            )
    return found


def shared_memory_bytes(tile: LoraTile, *, itemsize: int) -> dict[str, int]:
    """Returns how much each kernel takes at most: operands in flight, or the result; the expand
    both, of two blocks of ranks.

    As Triton did it in jax 0.11.2. Loads of tiles of 64 rows and more stay where they land until
    the matmul instruction has read them, so that each stage has a buffer; below that, the stage
    that computes has its operands in registers.
    """
    shrink, expand, rows = tile.shrink, tile.expand, tile.block_rows

    def buffers(stages: int) -> int:
        return stages if rows >= 64 else max(1, stages - 1)

    x_and_a = (rows + shrink.block_ranks) * shrink.block_k * itemsize
    b = expand.block_ranks * expand.block_columns * itemsize
    h = rows * expand.block_ranks * itemsize
    out = rows * expand.block_columns * itemsize
    return {
        "shrink": max(x_and_a * buffers(shrink.stages), rows * shrink.block_ranks * 4),
        "expand": 2 * (h + buffers(expand.stages) * b) + out,
    }


def fitted(tile: LoraTile, *, itemsize: int) -> LoraTile:
    """Returns a tile with fewer steps in flight and columns at once, until it fits."""

    def too_large(name: str) -> bool:
        return shared_memory_bytes(tile, itemsize=itemsize)[name] > SHARED_MEMORY_BYTES

    while too_large("shrink") and tile.shrink.stages > 1:
        tile = _with_shrink(tile, stages=tile.shrink.stages - 1)
    while too_large("expand") and tile.expand.stages > 1:
        tile = _with_expand(tile, stages=tile.expand.stages - 1)
    while too_large("expand") and tile.expand.block_columns > 16:
        tile = _with_expand(tile, block_columns=tile.expand.block_columns // 2)
    return tile


def for_usual_ranks(tile: LoraTile) -> LoraTile:
    """Returns a tile with a program for every block of the first 128 ranks of a list.

    Searches meet rank 64 alone, for which half of them end at once. Of longer lists, blocks would
    be multiplied one after the other.
    """
    programs = max(1, USUAL_RANKS // tile.shrink.block_ranks)
    return _with_shrink(tile, rank_programs=programs)


def _with_shrink(tile: LoraTile, **changes: int) -> LoraTile:
    return dataclasses.replace(tile, shrink=dataclasses.replace(tile.shrink, **changes))


def _with_expand(tile: LoraTile, **changes: int) -> LoraTile:
    return dataclasses.replace(tile, expand=dataclasses.replace(tile.expand, **changes))


def block_height(rows: int) -> int:
    """The rows of a block for so many: a power of two that the matmul unit takes."""
    return max(16, power_of_two(rows))


def power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << max(0, n - 1).bit_length()
