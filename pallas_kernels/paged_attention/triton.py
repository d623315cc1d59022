"""Paged attention in Pallas-Triton, for NVIDIA GPUs.

A step of decodes is one launch a layer, with rotary and the write of keys and values in it. A step
with prompt chunks is three: the write, the decodes, the chunks; the last two fill one output.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import triton_chunks, triton_decode
from pallas_kernels.paged_attention.layout import Chunks, Decodes, KVPages
from pallas_kernels.paged_attention.tiles import AttentionTiles, attention_tiles
from pallas_kernels.paged_attention.triton_rows import Heads

DTYPES = ("bfloat16", "float16", "float32")
SIZES = (16, 32, 64, 128)


def check(qkv_TE: jax.Array, kv: KVPages) -> None:
    """Raises NotImplementedError for what the kernels do not take."""
    _, _, p, H = kv.k_PKpH.shape
    for name, dtype in (("qkv_TE", qkv_TE.dtype), ("the cache", kv.k_PKpH.dtype)):
        if dtype.name not in DTYPES:
            raise NotImplementedError(
                f"{name} has dtype {dtype.name}, 'triton' takes {', '.join(DTYPES)}; use 'xla'"
            )
    for name, size in (("head width", H), ("tokens a page", p)):
        if size not in SIZES:
            raise NotImplementedError(
                f"{name} is {size}, 'triton' takes powers of two from {SIZES[0]} to {SIZES[-1]}; "
                "use 'xla'"
            )


# Under a jit of its own, with the layer as an operand, a step of many layers traces and lowers this
# once; XLA inlines it again, and computes what depends on no layer once.
@functools.partial(jax.jit, static_argnames="tiles")
def attend(
    qkv_TE: jax.Array,
    angle_Th: jax.Array,
    kv: KVPages,
    page_T: jax.Array,
    offset_T: jax.Array,
    decodes: Decodes,
    chunks: Chunks | None,
    layer_page: jax.Array,
    *,
    tiles: AttentionTiles | None,
) -> tuple[jax.Array, KVPages]:
    """See `api.attend`, which has checked the shapes; `layer_page` is a scalar."""
    (T, E), (_, K, p, H), D = qkv_TE.shape, kv.k_PKpH.shape, decodes.kv_len_D.shape[0]
    heads = Heads(query=E // H - 2 * K, kv=K, width=H, page_tokens=p)
    tiles = tiles or _computed_tiles(qkv_TE, kv, decodes, heads)
    tokens = (qkv_TE.reshape(-1, H), jnp.cos(angle_Th), jnp.sin(angle_Th))
    caches = kv.k_PKpH.reshape(-1, H), kv.v_PKpH.reshape(-1, H)
    layer = {"layer_page": layer_page.reshape(1), "heads": heads}
    kv_len_D, page_DW = decodes.kv_len_D, decodes.page_DW
    if chunks is None:  # rows that are no decodes either are zeros
        kv_len_D, page_DW = jnp.pad(kv_len_D, (0, T - D)), jnp.pad(page_DW, ((0, T - D), (0, 0)))
    else:
        caches = triton_chunks.write_kv(tokens, *caches, page_T=page_T, offset_T=offset_T, **layer)
    out_RH, *caches = triton_decode.attend(
        tokens,
        *caches,
        kv_len_D=kv_len_D,
        page_DW=page_DW,
        tile=tiles.decode,
        out_tokens=T,
        **layer,
    )
    if chunks is not None:
        out_RH = triton_chunks.attend(
            tokens,
            *caches,
            out_RH=out_RH,
            chunks=chunks,
            decodes=decodes.count,
            tile=tiles.chunk,
            **layer,
        )
    k_PKpH, v_PKpH = (cache.reshape(kv.k_PKpH.shape) for cache in caches)
    return out_RH.reshape(T, heads.query, H), KVPages(k_PKpH=k_PKpH, v_PKpH=v_PKpH)


def _computed_tiles(
    qkv_TE: jax.Array, kv: KVPages, decodes: Decodes, heads: Heads
) -> AttentionTiles:
    D, W = decodes.page_DW.shape
    return attention_tiles(
        tokens=qkv_TE.shape[0],
        decodes=D,
        heads=heads.query,
        kv_heads=heads.kv,
        request_tokens=W * heads.page_tokens,
        itemsize=max(qkv_TE.dtype.itemsize, kv.k_PKpH.dtype.itemsize),
    )
