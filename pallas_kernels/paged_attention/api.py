"""Causal attention of a step's flat tokens over the paged cache, grouped heads included.

    out_TNH[t] = softmax(q_TNH[t] . k / sqrt(H)) v   over the keys at positions <= t's own

T tokens, N query heads, K key-value heads, H head width. Keys of the step itself are written to
their pages first (`write_kv`), so attention reads pages only.
"""

from typing import Literal

import jax
import numpy as np

from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.layout import Chunks, Decodes, KVPages

Implementation = Literal["xla"]


def write_kv(
    kv: KVPages,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    *,
    page_T: jax.Array,
    offset_T: jax.Array,
    layer_page: int,
) -> KVPages:
    """Writes the step's keys and values to their pages.

    Args:
      kv: the cache; donate it to the enclosing jit, so that this happens in place.
      k_TKH: `[T, K, H]` keys after rotary embedding, cast to the dtype of the cache.
      v_TKH: `[T, K, H]` values.
      page_T: `[T]` int32 page of each token; padding tokens write to page 0.
      offset_T: `[T]` int32 place within the page, in `[0, p)`.
      layer_page: row of the layer's page 0.
    """
    return xla.write_kv(kv, k_TKH, v_TKH, page_T, offset_T, np.int32(layer_page))


def paged_attention(
    q_TNH: jax.Array,
    kv: KVPages,
    *,
    decodes: Decodes,
    chunks: Chunks | None,
    layer_page: int,
    implementation: Implementation,
) -> jax.Array:
    """Attends decode rows and prompt chunks, each to its own request's pages.

    Args:
      q_TNH: `[T, N, H]` queries after rotary embedding; N is a multiple of K.
      kv: the cache, which holds this step's keys and values already.
      decodes: the first `D <= T` tokens.
      chunks: where prompt tokens lie, or None in a step that has none.
      layer_page: row of the layer's page 0.
      implementation: "xla" runs anywhere.

    Returns:
      `[T, N, H]` in the dtype of `q_TNH`; softmax and sums are float32. Rows of padding tokens
      hold unspecified finite values.

    Raises:
      ValueError: the shapes contradict each other.
    """
    (T, N, H), (_, K, _, H_kv) = q_TNH.shape, kv.k_PKpH.shape
    if N % K or H_kv != H:
        raise ValueError(
            f"queries have {N} heads of {H}, the cache {K} heads of {H_kv}: "
            "the head counts must divide and the widths agree"
        )
    if decodes.kv_len_D.shape[0] > T:
        raise ValueError(f"{decodes.kv_len_D.shape[0]} decode rows exceed T={T} tokens")
    match implementation:
        case "xla":
            return xla.paged_attention(q_TNH, kv, decodes, chunks, np.int32(layer_page))
    raise ValueError(f"unknown implementation {implementation!r}; known: 'xla'")
