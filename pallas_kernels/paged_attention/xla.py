"""Paged attention in plain XLA: running softmax over tiles of pages, in loops of run-time length.

Time follows the tokens in use, not the longest request that fits, and no shape depends on them.
On a CPU this took 0.2-0.4 of the time of gathering every request's pages to one common length
(docs/decisions.md). G query heads share a key-value head; q is one block of a chunk's tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.layout import KVPages
from pallas_kernels.paged_attention.rotary import rotate

BLOCK_Q = 64
TILE_TOKENS = 64  # keys a loop step: one page, or several small ones
MASKED = -1e30  # finite, so that a row with every key masked stays finite


class _Softmax(NamedTuple):
    """Running softmax: the largest score so far, the sum of weights, the weighted values."""

    top: jax.Array
    total: jax.Array
    out: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, ...], width: int) -> "_Softmax":
        return cls(
            jnp.full(shape, MASKED, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, width), jnp.float32),
        )

    def add(self, scores, values, product: str) -> "_Softmax":
        top = jnp.maximum(self.top, scores.max(-1))
        shrink = jnp.exp(self.top - top)
        weights = jnp.exp(scores - top[..., None])
        return _Softmax(
            top,
            self.total * shrink + weights.sum(-1),
            self.out * shrink[..., None]
            + jnp.einsum(
                product,
                weights.astype(values.dtype),
                values,
                preferred_element_type=jnp.float32,
            ),
        )

    def result(self) -> jax.Array:
        return self.out / jnp.maximum(self.total, 1e-30)[..., None]


# Under a jit of its own, with the layer as an operand, a step of many layers traces and lowers this
# once; XLA inlines it again.
@jax.jit
def attend(qkv_TE, angle_Th, kv, page_T, offset_T, decodes, chunks, layer_page):
    """See `api.attend`, which has checked the shapes."""
    (T, E), (_, K, _, H) = qkv_TE.shape, kv.k_PKpH.shape
    # As a constant it would end up in many loops' code, and each layer's be compiled anew.
    layer_page = jax.lax.optimization_barrier(layer_page)
    qk_TMH, v_TKH = jnp.split(qkv_TE.reshape(T, E // H, H), (E // H - K,), axis=1)
    q_TNH, k_TKH = jnp.split(rotate(qk_TMH, angle_Th), (E // H - 2 * K,), axis=1)
    rows_T = page_T + layer_page
    kv = KVPages(
        k_PKpH=kv.k_PKpH.at[rows_T, :, offset_T].set(k_TKH.astype(kv.k_PKpH.dtype)),
        v_PKpH=kv.v_PKpH.at[rows_T, :, offset_T].set(v_TKH.astype(kv.v_PKpH.dtype)),
    )
    return _attend(q_TNH, kv, decodes, chunks, layer_page), kv


def _attend(q_TNH, kv, decodes, chunks, layer_page):
    """Attends pages that hold the step's own keys already."""
    (T, N, H), K, D = q_TNH.shape, kv.k_PKpH.shape[1], decodes.kv_len_D.shape[0]
    q_TKGH = (q_TNH * H**-0.5).astype(q_TNH.dtype).reshape(T, K, N // K, H)
    decoded_DKGH = _attend_decodes(q_TKGH[:D], kv, decodes, layer_page)
    if chunks is None:
        return jnp.pad(decoded_DKGH, ((0, T - D), (0, 0), (0, 0), (0, 0))).reshape(T, N, H)
    out_TKGH = _attend_chunks(q_TKGH, kv, chunks, layer_page)
    is_decode_D = jnp.arange(D) < decodes.count
    first_DKGH = jnp.where(is_decode_D[:, None, None, None], decoded_DKGH, out_TKGH[:D])
    return out_TKGH.at[:D].set(first_DKGH).reshape(T, N, H)


def _tile_pages(kv) -> int:
    return max(1, TILE_TOKENS // kv.k_PKpH.shape[2])


def _load(pages_PKpH, rows, dtype):
    """Gathers `[..., tile]` pages as `[..., K, tile * p, H]`."""
    tile = jnp.moveaxis(pages_PKpH[rows], -4, -3)  # [..., K, tile, p, H]
    return tile.reshape(*tile.shape[:-3], -1, tile.shape[-1]).astype(dtype)


def _padded(page_BW, tile: int):
    """Widens the page table to whole tiles: dynamic slices must not be clamped."""
    return jnp.pad(page_BW, ((0, 0), (0, -page_BW.shape[1] % tile)))


def _attend_decodes(q_DKGH, kv, decodes, layer_page):
    (D, K, G, H), tile = q_DKGH.shape, _tile_pages(kv)
    tile_tokens = tile * kv.k_PKpH.shape[2]
    page_DW = _padded(decodes.page_DW, tile)

    def add_tile(j, softmax):
        rows_DW = jax.lax.dynamic_slice_in_dim(page_DW, j * tile, tile, 1) + layer_page
        k_DKSH, v_DKSH = (_load(p, rows_DW, q_DKGH.dtype) for p in (kv.k_PKpH, kv.v_PKpH))
        scores_DKGS = jnp.einsum(
            "DKGH,DKSH->DKGS", q_DKGH, k_DKSH, preferred_element_type=jnp.float32
        )
        seen_DS = j * tile_tokens + jnp.arange(tile_tokens) < decodes.kv_len_D[:, None]
        scores_DKGS = jnp.where(seen_DS[:, None, None], scores_DKGS, MASKED)
        return softmax.add(scores_DKGS, v_DKSH, "DKGS,DKSH->DKGH")

    tiles = -(-jnp.max(decodes.kv_len_D) // tile_tokens)
    softmax = jax.lax.fori_loop(0, tiles, add_tile, _Softmax.empty((D, K, G), H))
    return softmax.result().astype(q_DKGH.dtype)


def _attend_chunks(q_TKGH, kv, chunks, layer_page):
    (T, K, G, H), tile = q_TKGH.shape, _tile_pages(kv)
    tile_tokens, block = tile * kv.k_PKpH.shape[2], min(BLOCK_Q, T)
    page_CW = _padded(chunks.page_CW, tile)
    q_TKGH = jnp.pad(q_TKGH, ((0, block), (0, 0), (0, 0), (0, 0)))

    def attend_block(c, first, out_TKGH):
        """Tokens `first ... first + block` of chunk c, which may run past its end."""
        q_qKGH = jax.lax.dynamic_slice_in_dim(q_TKGH, chunks.start_C[c] + first, block)
        q_KRH = jnp.moveaxis(q_qKGH, 0, 2).reshape(K, G * block, H)
        position_q = chunks.kv_len_C[c] - chunks.len_C[c] + first + jnp.arange(block)

        def add_tile(j, softmax):
            rows_W = jax.lax.dynamic_slice_in_dim(page_CW[c], j * tile, tile) + layer_page
            k_KSH, v_KSH = (_load(p, rows_W, q_KRH.dtype) for p in (kv.k_PKpH, kv.v_PKpH))
            scores_KRS = jnp.einsum(
                "KRH,KSH->KRS", q_KRH, k_KSH, preferred_element_type=jnp.float32
            )
            seen_qS = j * tile_tokens + jnp.arange(tile_tokens) <= position_q[:, None]
            scores_KGqS = scores_KRS.reshape(K, G, block, tile_tokens)
            scores_KRS = jnp.where(seen_qS, scores_KGqS, MASKED).reshape(scores_KRS.shape)
            return softmax.add(scores_KRS, v_KSH, "KRS,KSH->KRH")

        last = jnp.minimum(chunks.kv_len_C[c], position_q[-1] + 1)
        softmax = jax.lax.fori_loop(
            0, -(-last // tile_tokens), add_tile, _Softmax.empty((K, G * block), H)
        )
        out_qKGH = jnp.moveaxis(softmax.result().reshape(K, G, block, H), 2, 0)
        # Rows past the chunk's end are overwritten by the chunk that follows, or are padding.
        return jax.lax.dynamic_update_slice_in_dim(
            out_TKGH, out_qKGH.astype(out_TKGH.dtype), chunks.start_C[c] + first, 0
        )

    def attend_chunk(c, out_TKGH):
        blocks = -(-chunks.len_C[c] // block)
        return jax.lax.fori_loop(
            0, blocks, lambda b, out: attend_block(c, b * block, out), out_TKGH
        )

    out_TKGH = jax.lax.fori_loop(0, chunks.count, attend_chunk, jnp.zeros_like(q_TKGH))
    return out_TKGH[:T]
