"""Merging in plain XLA: a loop over blocks of an adapter's pages, of run-time length.

r the rank rows of one block of pages; the other letters are those of `api`.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.lora_matmul.layout import PAGE_RANKS, LoraPool

# The float32 sum is read and written once a block: 64 ranks at a time, most adapters take one.
BLOCK_PAGES = 4


# `merged_DE` is read by nothing, and kept because the result takes its memory.
@functools.partial(
    jax.jit, static_argnames="columns", donate_argnames="merged_DE", keep_unused=True
)
def lora_merge(merged_DE, base_DE, pools, layer, slot, *, columns):
    """See `api.lora_merge`, which has checked the shapes."""
    pieces, done = [], 0
    for pool, column in zip(pools, columns, strict=True):
        stop = column + pool.b_RE.shape[1]
        pieces.append(base_DE[:, done:column])
        sum_DE = base_DE[:, column:stop].astype(jnp.float32) + _update(pool, layer, slot)
        pieces.append(sum_DE.astype(base_DE.dtype))
        done = stop
    return jnp.concatenate([*pieces, base_DE[:, done:]], axis=1)


def _update(pool: LoraPool, layer, slot):
    """The update of one linear, `[D, E]` float32."""
    pages = pool.pages_S[slot]
    layer_page = layer * pool.layer_pages

    def add_block(i, update_DE):
        nth_p = i * BLOCK_PAGES + jnp.arange(BLOCK_PAGES)
        page_p = jnp.take(pool.page_SW[slot], nth_p, mode="clip") + layer_page
        row_r = (page_p[:, None] * PAGE_RANKS + jnp.arange(PAGE_RANKS)).reshape(-1)
        used_r = jnp.repeat(nth_p < pages, PAGE_RANKS)
        # Pages past the adapter's last are another's: both factors, as 0 times infinity is not 0.
        a_rD, b_rE = (jnp.where(used_r[:, None], x[row_r], 0) for x in (pool.a_RD, pool.b_RE))
        return update_DE + jnp.einsum(
            "rD,rE->DE",
            a_rD,
            b_rE,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    zeros_DE = jnp.zeros((pool.a_RD.shape[1], pool.b_RE.shape[1]), jnp.float32)
    update_DE = jax.lax.fori_loop(0, -(-pages // BLOCK_PAGES), add_block, zeros_DE)
    return pool.scale_LS[layer, slot] * update_DE
