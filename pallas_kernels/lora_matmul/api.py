"""The LoRA operator: y_t += scale * (x_t A^T) B for every row t, each row with its own adapter.

    out_TE[t] = y_TE[t] + sum over pages p with owner_P[p] == adapter_T[t] of
                scale_LS[layer, owner_P[p]] * (x_TD[t] @ A_p^T) @ B_p

A rank page holds 16 rank rows of one adapter, for every layer; an adapter of rank r owns
ceil(r / 16) pages, so that memory and time follow the ranks in use. T rows, D input width,
E output width, P pages, L layers, S adapter slots.
"""

from typing import Literal

import jax
import numpy as np

from pallas_kernels.lora_matmul import xla
from pallas_kernels.lora_matmul.layout import ActivePages, LoraPool

Implementation = Literal["xla"]


def lora_matmul(
    y_TE: jax.Array,
    x_TD: jax.Array,
    pool: LoraPool,
    *,
    active: ActivePages,
    adapter_T: jax.Array,
    layer: int,
    implementation: Implementation,
) -> jax.Array:
    """Adds each row's adapter to the base product.

    Args:
      y_TE: `[T, E]` base product.
      x_TD: `[T, D]` input of the linear, same dtype as `y_TE`.
      pool: rank pages; cast to the dtype of `x_TD` where they differ.
      active: the pages in use; each at most once. Their values are on the device and are
        not checked.
      adapter_T: `[T]` int32 adapter slot of each row, -1 for none.
      layer: which layer's rows of each page to use, in `[0, layers)`.
      implementation: "xla" runs anywhere.

    Returns:
      `[T, E]` in the dtype of `y_TE`; products accumulate in float32.

    Raises:
      ValueError: the shapes contradict each other.
    """
    (T, D), E = x_TD.shape, y_TE.shape[1]
    if pool.a_RD.shape[1] != D or pool.b_RE.shape[1] != E:
        raise ValueError(
            f"pool is for a linear {pool.a_RD.shape[1]} -> {pool.b_RE.shape[1]}, "
            f"x_TD and y_TE are {D} -> {E}"
        )
    if y_TE.shape[0] != T or adapter_T.shape != (T,):
        raise ValueError(
            f"row counts differ: x_TD has {T}, y_TE {y_TE.shape[0]}, adapter_T {adapter_T.shape}"
        )
    layers = pool.scale_LS.shape[0]
    if not 0 <= layer < layers:
        raise ValueError(f"layer={layer} is not in [0, {layers})")
    match implementation:
        case "xla":
            return xla.lora_matmul(y_TE, x_TD, pool, active, adapter_T, np.int32(layer))
    raise ValueError(f"unknown implementation {implementation!r}; known: 'xla'")
