"""Adds the low-rank updates of many adapters, of different ranks, to base products."""

from pallas_kernels.lora_matmul.api import (
    Counters,
    Implementation,
    Part,
    base_product,
    block_rows,
    compiler_options,
    lora_linear,
    lora_matmul,
)
from pallas_kernels.lora_matmul.layout import MAX_RANK, PAGE_RANKS, LoraPool, RowTiles
from pallas_kernels.lora_matmul.tuned import table as tuned_table
from pallas_kernels.tuning.table import Segments

__all__ = [
    "MAX_RANK",
    "PAGE_RANKS",
    "Counters",
    "Implementation",
    "LoraPool",
    "Part",
    "RowTiles",
    "Segments",
    "base_product",
    "block_rows",
    "compiler_options",
    "lora_linear",
    "lora_matmul",
    "tuned_table",
]
