"""Adds the low-rank updates of many adapters, of different ranks, to one base product."""

from pallas_kernels.lora_matmul.api import Implementation, lora_matmul
from pallas_kernels.lora_matmul.layout import PAGE_RANKS, ActivePages, LoraPool

__all__ = ["PAGE_RANKS", "ActivePages", "Implementation", "LoraPool", "lora_matmul"]
