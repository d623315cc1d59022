"""Causal self-attention of a step's flat tokens over the paged cache.

T tokens, D width, N query heads, K key-value heads, H head width.
"""

import dataclasses
import functools

import jax
from flax import nnx
from jax.typing import DTypeLike

from pallas_kernels.paged_attention import (
    Chunks,
    Decodes,
    KVPages,
    paged_attention,
    write_kv,
)
from pallas_kernels.paged_attention import Implementation as Kernel
from valora_jax.layers.linear import Linear
from valora_jax.layers.rotary import rotate
from valora_jax.lora.batch import LoraBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBatch:
    """Where a step's tokens write their keys and values, and what they attend to.

    Attributes:
      page_T: `[T]` int32 page of each token; 0, the scratch page, for padding.
      offset_T: `[T]` int32 place within the page.
      decodes: requests with one token in the step, first on the flat axis.
      chunks: chunks of prompts, or None where the step's shape has none.
    """

    page_T: jax.Array
    offset_T: jax.Array
    decodes: Decodes
    chunks: Chunks | None


class KVCursor:
    """The cache while a step is traced: each layer writes and reads its own pages through it.

    Holds the arrays as they become; the step returns `kv` at the end.
    """

    def __init__(self, kv: KVPages, *, layers: int, batch: AttentionBatch, kernel: Kernel):
        self.kv, self._batch = kv, batch
        self._kernel: Kernel = kernel
        self._pages = kv.k_PKpH.shape[0] // layers

    def attend(
        self, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, *, layer: int
    ) -> jax.Array:
        """Writes the step's keys and values, then attends; returns `[T, N, H]`."""
        layer_page = layer * self._pages
        self.kv = write_kv(
            self.kv,
            k_TKH,
            v_TKH,
            page_T=self._batch.page_T,
            offset_T=self._batch.offset_T,
            layer_page=layer_page,
        )
        return paged_attention(
            q_TNH,
            self.kv,
            decodes=self._batch.decodes,
            chunks=self._batch.chunks,
            layer_page=layer_page,
            implementation=self._kernel,
        )


class Attention(nnx.Module):
    """q, k, v from one matmul, rotary positions, grouped heads, output projection."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int,
        head_width: int,
        layer: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.head_width, self.layer = head_width, layer
        q, kv = heads * head_width, kv_heads * head_width
        sites = ("decoder.q", "decoder.k", "decoder.v")
        linear = functools.partial(Linear, layer=layer, dtype=dtype, rngs=rngs)
        self.qkv = linear(width, (q, kv, kv), sites=sites)
        self.out = linear(q, (width,), sites=("decoder.o",))

    def __call__(
        self, x_TD: jax.Array, angle_Th: jax.Array, *, cursor: KVCursor, lora: LoraBatch | None
    ) -> jax.Array:
        T = x_TD.shape[0]
        parts = self.qkv(x_TD, lora)
        q_TNH, k_TKH, v_TKH = (part.reshape(T, -1, self.head_width) for part in parts)
        q_TNH, k_TKH = rotate(q_TNH, angle_Th), rotate(k_TKH, angle_Th)
        out_TNH = cursor.attend(q_TNH, k_TKH, v_TKH, layer=self.layer)
        (out_TD,) = self.out(out_TNH.reshape(T, -1), lora)
        return out_TD
