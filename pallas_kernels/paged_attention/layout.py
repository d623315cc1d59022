"""How keys and values lie in device memory, and which of a step's tokens attend to which pages.

A step's T tokens lie on one axis: first one token of each decoding request, then the chunks of
prompts, each contiguous. D decode rows, C chunks, W pages a request, K key-value heads,
p tokens a page, H head width. Page 0 of each layer is scratch: padding tokens write there.
"""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KVPages:
    """The cache of all layers.

    Attributes:
      k_PKpH: `[layers * pages, K, p, H]`; a head's part of a page is contiguous. Page i of
        layer l is row `l * pages + i`.
      v_PKpH: the same for values.
    """

    k_PKpH: jax.Array
    v_PKpH: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Decodes:
    """Requests with one token in this step; request d is token d of the flat axis.

    Attributes:
      kv_len_D: `[D]` int32 tokens to attend to, the own one included; 0 in unused rows.
      page_DW: `[D, W]` int32 page ids, within a layer.
      count: scalar int32, how many rows are used.
    """

    kv_len_D: jax.Array
    page_DW: jax.Array
    count: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chunks:
    """Chunks of prompts, in the order of the flat axis: the first follows the last decode, each
    other the one before it.

    Attributes:
      start_C: `[C]` int32 first flat token of each chunk.
      len_C: `[C]` int32 tokens in the chunk.
      kv_len_C: `[C]` int32 tokens of the request up to the chunk's end; its token i sits at
        position `kv_len - len + i` and attends to everything up to itself.
      page_CW: `[C, W]` int32 page ids, within a layer.
      count: scalar int32, how many chunks there are.
    """

    start_C: jax.Array
    len_C: jax.Array
    kv_len_C: jax.Array
    page_CW: jax.Array
    count: jax.Array
