"""Rotary positions, the write to the paged cache, and causal attention of a step's flat tokens.

    q_TNH, k_TKH, v_TKH = split(qkv_TE);  q, k = rotate(q), rotate(k);  pages[t] = k[t], v[t]
    out_TNH[t] = softmax(q_TNH[t] . k / sqrt(H)) v   over the keys at positions <= t's own

One call, so that an implementation may fuse the three. T tokens, N query heads, K key-value heads,
H head width, h = H / 2, E = (N + 2 K) * H.
"""

from typing import Literal

import jax
import numpy as np

from pallas_kernels.paged_attention import triton, xla
from pallas_kernels.paged_attention.layout import Chunks, Decodes, KVPages
from pallas_kernels.paged_attention.tiles import AttentionTiles

Implementation = Literal["triton", "xla"]


def attend(
    qkv_TE: jax.Array,
    angle_Th: jax.Array,
    kv: KVPages,
    *,
    page_T: jax.Array,
    offset_T: jax.Array,
    decodes: Decodes,
    chunks: Chunks | None,
    layer_page: int,
    implementation: Implementation,
    tiles: AttentionTiles | None = None,
) -> tuple[jax.Array, KVPages]:
    """Writes the step's keys and values, and attends each token to its own request's pages.

    Args:
      qkv_TE: `[T, E]` queries, keys and values before rotary embedding, side by side. E says how
        many query heads there are: a multiple of K.
      angle_Th: `[T, h]` float32 rotary angle of each token and component.
      kv: the cache, in a dtype of its own; donate it to the enclosing jit, so that the write
        happens in place.
      page_T: `[T]` int32 page of each token, within a layer; padding tokens write to page 0.
      offset_T: `[T]` int32 place within the page, in `[0, p)`. For decode rows both must say the
        place of the last of `kv_len` tokens; "triton" takes it from `decodes`.
      decodes: the first `D <= T` tokens.
      chunks: where prompt tokens lie, or None in a step that has none.
      layer_page: row of the layer's page 0.
      implementation: "triton" for NVIDIA GPUs, "xla" anywhere.
      tiles: shape of the "triton" kernels' blocks; chosen by the shapes by default.

    Returns:
      `[T, N, H]` in the dtype of `qkv_TE`, with float32 softmax and sums, and the cache. Rows of
      padding tokens hold unspecified finite values.

    Raises:
      ValueError: the shapes contradict each other.
      NotImplementedError: the "triton" kernels do not take these shapes or dtypes; "xla" does.
    """
    (T, E), (_, K, _, H) = qkv_TE.shape, kv.k_PKpH.shape
    if E % H or E // H < 3 * K or E // H % K:
        raise ValueError(
            f"qkv_TE has {E} columns, the cache {K} heads of {H}: columns must be "
            f"(N + 2 * {K}) * {H} with N, the query heads, a multiple of {K}"
        )
    if angle_Th.shape != (T, H // 2):
        raise ValueError(f"angle_Th has shape {angle_Th.shape}, want ({T}, {H // 2})")
    if decodes.kv_len_D.shape[0] > T:
        raise ValueError(f"{decodes.kv_len_D.shape[0]} decode rows exceed T={T} tokens")
    args = qkv_TE, angle_Th, kv, page_T, offset_T, decodes, chunks, np.int32(layer_page)
    match implementation:
        case "xla":
            return xla.attend(*args)
        case "triton":
            triton.check(qkv_TE, kv)
            return triton.attend(*args, tiles=tiles)
    raise ValueError(f"unknown implementation {implementation!r}; known: 'triton', 'xla'")
