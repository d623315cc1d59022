"""Which tiles of `triton_linear` are worth being compiled for a shape; see `candidates`."""

import math

from pallas_kernels.lora_matmul.candidates import REGISTERS, SPARE_REGISTERS, Task
from pallas_kernels.lora_matmul.tiles import USUAL_RANKS, block_height, power_of_two
from pallas_kernels.lora_matmul.tiles_linear import LinearTile, refusals
from pallas_kernels.lora_matmul.tuned import ITEM_BYTES
from pallas_kernels.tuning.search import Ladders


def ladders(task: Task) -> Ladders:
    """The rungs of every number of a tile, but for the height, which is the task's."""
    return {
        "block_columns": (16, 32, 64, 128, 256),
        "block_k": (32, 64, 128, 256),
        "block_ranks": (16, 32, 64, 128),
        "row_programs": [2**i for i in range(power_of_two(task.tokens).bit_length())],
        "splits": (1, 2, 4),
        "shrink.block_k": (64, 128, 256, 512),
        "shrink.block_ranks": (16, 32, 64, 128),
        "shrink.rank_programs": (1, 2, 4, 8),
        "shrink.splits": (1, 2, 4, 8),
        "shrink.warps": (2, 4, 8),
        "shrink.stages": (2, 3, 4, 5, 6, 7, 8),
    }


def legal(tile: LinearTile, task: Task) -> bool:
    """Whether a tile obeys the kernel's rules and fits the device and the shape."""
    shrink = tile.shrink
    return (
        tile.tile_rows == task.block_rows
        and not refusals(tile, rows=task.tokens, itemsize=ITEM_BYTES)
        and registers(tile, rows=task.tokens) <= REGISTERS
        and max(tile.block_k, shrink.block_k) <= power_of_two(task.linear.width)
        and tile.splits < 2 * math.ceil(task.linear.width / tile.block_k)
        and shrink.splits < 2 * math.ceil(task.linear.width / shrink.block_k)
        and (shrink.rank_programs == 1 or shrink.rank_programs * shrink.block_ranks <= USUAL_RANKS)
        and tile.block_columns <= power_of_two(max(task.linear.columns))
    )


def registers(tile: LinearTile, *, rows: int) -> int:
    """Estimates the registers of a thread, in the largest of the three products."""
    height, words = block_height(rows), ITEM_BYTES / 4

    def held(rows: int, columns: int, inner: int) -> float:
        return rows * columns + (rows + columns) * inner * words

    most = max(
        held(height, tile.block_columns, tile.block_k),
        held(height, tile.block_columns, tile.block_ranks) + height * tile.block_ranks,
        held(tile.tile_rows, tile.shrink.block_ranks, tile.shrink.block_k),
    )
    return SPARE_REGISTERS + math.ceil(most / (32 * tile.warps))
