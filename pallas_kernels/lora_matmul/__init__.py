"""Adds the low-rank updates of many adapters, of different ranks, to base products."""

from pallas_kernels.lora_matmul.api import (
    Counters,
    Implementation,
    Part,
    base_product,
    block_rows,
    lora_linear,
    lora_matmul,
)
from pallas_kernels.lora_matmul.layout import MAX_RANK, PAGE_RANKS, LoraPool, RowTiles
from pallas_kernels.lora_matmul.tiles_linear import MAX_ROWS as ONE_LAUNCH_ROWS
from pallas_kernels.lora_matmul.tuned import table as tuned_table
from pallas_kernels.tuning.table import Segments

__all__ = [
    "MAX_RANK",
    "ONE_LAUNCH_ROWS",
    "PAGE_RANKS",
    "Counters",
    "Implementation",
    "LoraPool",
    "Part",
    "RowTiles",
    "Segments",
    "base_product",
    "block_rows",
    "lora_linear",
    "lora_matmul",
    "tuned_table",
]
