"""Folds one adapter into a copy of a linear's weights."""

from pallas_kernels.lora_merge.api import Implementation, fastest, lora_merge
from pallas_kernels.lora_merge.tiles import MergeTile

__all__ = ["Implementation", "MergeTile", "fastest", "lora_merge"]
