"""Attention over a paged key-value cache, for decode rows and prompt chunks side by side."""

from pallas_kernels.paged_attention.api import Implementation, attend
from pallas_kernels.paged_attention.layout import Chunks, Decodes, KVPages

__all__ = ["Chunks", "Decodes", "Implementation", "KVPages", "attend"]
