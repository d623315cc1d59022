"""Shapes of the blocks in which `triton_linear` works: the base product and the LoRA expand."""

import dataclasses

from pallas_kernels.lora_matmul.tiles import SHARED_MEMORY_BYTES, power_of_two

MAX_ROWS = 32  # above, programs read about as much of x as of w
MAX_SPLITS = 4  # every program reads all partial sums, and holds those of a block in registers
MIN_PROGRAMS = 92  # 70 % of an H100's multiprocessors: fewer do not saturate its memory


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LinearTile:
    """How `x @ w + h @ B` is cut; a program has all rows.

    Attributes:
      block_columns: output columns of a program.
      block_k: input columns of one step.
      block_ranks: ranks multiplied at once.
      warps: of 32 threads, a program.
      stages: steps whose loads are in flight.
    """

    block_columns: int
    block_k: int
    block_ranks: int
    warps: int
    stages: int


def linear_tile(*, width: int, columns: int, itemsize: int) -> LinearTile:
    """Returns a good tile for up to `MAX_ROWS` rows, whose bytes are those of the weights.

    Args:
      width: D.
      columns: E, of all linears that share the input.
      itemsize: bytes of an element of x and w.
    """
    # The wider the blocks, the fewer programs read x.
    # Exact float32 products have no tensor cores, and in wide blocks spill their registers.
    wide = () if itemsize > 2 else (128, 64)
    block_columns = next((size for size in wide if columns / size >= MIN_PROGRAMS), 32)
    block_k, stages = {128: (64, 5), 64: (64, 6), 32: (128, 7)}[block_columns]
    return LinearTile(
        block_columns=max(16, min(block_columns, power_of_two(columns))),
        block_k=max(16, min(block_k * 2 // itemsize, power_of_two(width))),
        block_ranks=64,
        warps=4,
        stages=stages,
    )


def refusals(tile: LinearTile, *, rows: int, itemsize: int) -> list[str]:
    """Returns the rules that a tile breaks, with its values; none for a legal one.

    Args:
      tile: any values.
      rows: T.
      itemsize: bytes of an element of x and w.
    """
    blocks = ("block_columns", "block_k", "block_ranks")
    sizes = ((name, getattr(tile, name)) for name in blocks)
    found = [
        f"{name}={size} is not a power of two of at least 16"
        for name, size in sizes
        if size < 16 or size != power_of_two(size)
    ]
    if tile.warps not in (1, 2, 4, 8, 16):
        found.append(f"warps={tile.warps} is not 1, 2, 4, 8 or 16")
    if tile.stages < 1:
        found.append(f"stages={tile.stages} is not at least 1")
    if (needed := shared_memory_bytes(tile, rows=rows, itemsize=itemsize)) > SHARED_MEMORY_BYTES:
        found.append(
            f"it needs about {needed} bytes of shared memory, a program has {SHARED_MEMORY_BYTES}"
        )
    return found


def shared_memory_bytes(tile: LinearTile, *, rows: int, itemsize: int) -> int:
    """Returns how much a program takes at most: operands in flight, of the product or the expand.

    As Triton did it in jax 0.11.2; see `tiles.shared_memory_bytes` for when a stage has a buffer.
    """
    height = block_rows(rows)
    buffers = tile.stages if height >= 64 else max(1, tile.stages - 1)
    product = (height + tile.block_columns) * tile.block_k * itemsize
    expand = tile.block_ranks * (tile.block_columns * itemsize + 4)
    h = height * tile.block_ranks * itemsize
    return max(product * buffers, expand * buffers + h)


def block_rows(rows: int) -> int:
    """The rows of a program: all of them, and those that a block must have."""
    return max(16, power_of_two(rows))
