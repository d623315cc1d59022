"""Which tiles of the LoRA kernels are worth being compiled for a shape.

A tile is left out before anything is compiled if it breaks a rule of the kernels, does not fit into
shared memory or registers, or is larger than what it cuts.
"""

import dataclasses
import math

from pallas_kernels.lora_matmul.tiles import MOST_EXPAND_STAGES, LoraTile, power_of_two, refusals
from pallas_kernels.lora_matmul.tuned import ITEM_BYTES, LINEAR, LORA
from pallas_kernels.tuning.search import Ladders
from pallas_kernels.tuning.shapes import LinearShape

# Which launches serve so many rows, and the heights of row tiles that may suit them, what matters
# most first. Steps of other sizes take the nearest.
STEPS = (
    (LINEAR, 8, (16,)),
    (LINEAR, 32, (16,)),
    (LINEAR, 64, (16,)),
    (LORA, 4096, (64, 128)),
    (LORA, 512, (32, 64)),
)
# Few steps have so many rows: the first model's tiles serve all, so that a device takes 25 minutes.
RARE_STEPS = (
    (LINEAR, 1, (16,)),
    (LORA, 128, (16, 32)),
)
REGISTERS = 255  # of a thread, at most
# Addresses, masks and counters of a thread.
SPARE_REGISTERS = 32
MOST_SEGMENTS = 32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One search: an operator, a product of linears, the rows of a step, a height of row tiles."""

    op: str
    linear: LinearShape
    tokens: int
    block_rows: int

    @property
    def columns(self) -> int:
        return sum(self.linear.columns)

    @property
    def name(self) -> str:
        return f"{self.op}/{self.linear.width}-{self.columns}/t{self.tokens}/h{self.block_rows}"

    @property
    def row_tiles(self) -> int:
        """The fewest: those of one adapter."""
        return math.ceil(self.tokens / self.block_rows)


def ladders(task: Task) -> Ladders:
    """The rungs of every number of a tile, but for the height, which is the task's."""
    # A program a row tile at least, one for each tile of the most adapters at most.
    most = min(task.tokens, task.row_tiles + MOST_SEGMENTS)
    first, last = (power_of_two(n).bit_length() - 1 for n in (task.row_tiles, most))
    return {
        "row_programs": [2**i for i in range(first, last + 1)],
        "shrink.block_k": (32, 64, 128, 256, 512),
        "shrink.block_ranks": (16, 32, 64, 128),
        "shrink.splits": (1, 2, 4, 8, 16, 32),
        "shrink.warps": (1, 2, 4, 8),
        "shrink.stages": (1, 2, 3, 4, 5, 6),
        "expand.block_columns": (32, 64, 128, 256),
        "expand.blocks": (1, 2, 4, 8, 16),
        "expand.block_ranks": (16, 32, 64, 128),
        "expand.warps": (1, 2, 4, 8),
        "expand.stages": range(1, MOST_EXPAND_STAGES + 1),
    }


def legal(tile: LoraTile, task: Task) -> bool:
    """Whether a tile obeys the kernels' rules and fits the device and the shape."""
    shrink, expand = tile.shrink, tile.expand
    return (
        tile.block_rows == task.block_rows
        and not refusals(tile, itemsize=ITEM_BYTES)
        and max(registers(tile).values()) <= REGISTERS
        and shrink.block_k <= power_of_two(task.linear.width)
        # Half as many would leave ranges of more than a step.
        and shrink.splits < 2 * math.ceil(task.linear.width / shrink.block_k)
        and expand.block_columns * expand.blocks <= power_of_two(max(task.linear.columns))
    )


def registers(tile: LoraTile) -> dict[str, int]:
    """Estimates the registers of a thread in each kernel: sums, and operands that are not in
    shared memory."""
    rows, shrink, expand = tile.block_rows, tile.shrink, tile.expand
    words = ITEM_BYTES / 4
    sums, updates = rows * shrink.block_ranks, rows * expand.block_columns
    shrink_operands = expand_operands = 0
    if rows < 64:  # the matmul instruction of taller tiles reads shared memory
        shrink_operands = (rows + shrink.block_ranks) * shrink.block_k * words
        # Of two blocks of ranks, as longer lists have.
        expand_operands = 2 * (rows + expand.block_columns) * expand.block_ranks * words
    of_program = {
        "shrink": (sums + shrink_operands, shrink.warps),
        # Sums, and what they are stored as.
        "expand": ((1 + words) * updates + expand_operands, expand.warps),
    }
    return {
        kernel: SPARE_REGISTERS + math.ceil(held / (32 * warps))
        for kernel, (held, warps) in of_program.items()
    }
