"""Kernels of valora_jax: one folder an operation, the same file names in each.

Usable without the rest: they take plain arrays and small pytrees, and know no model.
"""

from pallas_kernels import triton_dialect as triton_dialect
