"""Causal self-attention of a step's flat tokens over the paged cache.

T tokens, D width, N query heads, K key-value heads, H head width.
"""

import dataclasses
import functools

import jax
from flax import nnx
from jax.typing import DTypeLike

from pallas_kernels.paged_attention import Chunks, Decodes, KVPages, attend
from pallas_kernels.paged_attention import Implementation as Kernel
from valora_jax.layers.linear import Linear
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

    def attend(self, qkv_TE: jax.Array, angle_Th: jax.Array, *, layer: int) -> jax.Array:
        """Turns queries and keys, writes keys and values, attends; returns `[T, N, H]`."""
        out_TNH, self.kv = attend(
            qkv_TE,
            angle_Th,
            self.kv,
            page_T=self._batch.page_T,
            offset_T=self._batch.offset_T,
            decodes=self._batch.decodes,
            chunks=self._batch.chunks,
            layer_page=layer * self._pages,
            implementation=self._kernel,
        )
        return out_TNH


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
        self.layer = layer
        q, kv = heads * head_width, kv_heads * head_width
        sites = ("decoder.q", "decoder.k", "decoder.v")
        linear = functools.partial(Linear, layer=layer, dtype=dtype, rngs=rngs)
        self.qkv = linear(width, (q, kv, kv), sites=sites)
        self.out = linear(q, (width,), sites=("decoder.o",))

    def __call__(
        self, x_TD: jax.Array, angle_Th: jax.Array, *, cursor: KVCursor, lora: LoraBatch | None
    ) -> jax.Array:
        out_TNH = cursor.attend(self.qkv.together(x_TD, lora), angle_Th, layer=self.layer)
        (out_TD,) = self.out(out_TNH.reshape(x_TD.shape[0], -1), lora)
        return out_TD
