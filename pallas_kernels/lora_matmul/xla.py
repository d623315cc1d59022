"""The LoRA operator in plain XLA: a loop over row tiles, and one over the rank pages of each.

Trip counts are run-time data, so one executable serves any number of adapters of any ranks and
time follows the rows and the ranks in use.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.lora_matmul.layout import PAGE_RANKS, LoraPool, RowTiles

BLOCK_ROWS = 64


# Under a jit of its own, with the layer as an operand, a step of many layers traces and lowers this
# once a shape; XLA inlines it again.
@functools.partial(jax.jit, static_argnames="columns")
def lora_matmul(
    y_TE: jax.Array,
    x_TD: jax.Array,
    pools: tuple[LoraPool, ...],
    tiles: RowTiles,
    layer: jax.Array,
    *,
    columns: tuple[int, ...],
) -> jax.Array:
    """See `api.lora_matmul`, which has checked the shapes."""
    (T, D), rows = x_TD.shape, min(tiles.block_rows, x_TD.shape[0])

    def add_tile(m, y_TE):
        # The last tile's block may not stick out: it starts earlier and masks what is not its own.
        start = jnp.minimum(tiles.first_M[m], T - rows)
        row_t = start + jnp.arange(rows) - tiles.first_M[m]
        mine_t = (row_t >= 0) & (row_t < tiles.len_M[m])
        x_tD = jax.lax.dynamic_slice(x_TD, (start, 0), (rows, D))
        for pool, column in zip(pools, columns, strict=True):
            shape_tE = (rows, pool.b_RE.shape[1])
            y_tE = jax.lax.dynamic_slice(y_TE, (start, column), shape_tE).astype(jnp.float32)
            for slot, sign_t in ((tiles.plus_M[m], mine_t), (tiles.minus_M[m], -1.0 * mine_t)):
                y_tE = _add_branch(y_tE, x_tD, pool, layer, slot=slot, sign_t=sign_t)
            y_TE = jax.lax.dynamic_update_slice(y_TE, y_tE.astype(y_TE.dtype), (start, column))
        return y_TE

    return jax.lax.fori_loop(0, tiles.count, add_tile, y_TE)


def _add_branch(y_tE, x_tD, pool: LoraPool, layer, *, slot, sign_t):
    """Adds one adapter to the rows of a tile, page by page; slot -1 adds nothing."""
    layer_row = layer * (pool.a_RD.shape[0] // pool.scale_LS.shape[0])
    scale_t1 = (sign_t * pool.scale_LS[layer, slot])[:, None]

    def add_page(i, y_tE):
        row = layer_row + pool.page_SW[slot, i] * PAGE_RANKS
        a_rD = jax.lax.dynamic_slice_in_dim(pool.a_RD, row, PAGE_RANKS).astype(x_tD.dtype)
        b_rE = jax.lax.dynamic_slice_in_dim(pool.b_RE, row, PAGE_RANKS).astype(x_tD.dtype)
        h_tr = jnp.einsum("tD,rD->tr", x_tD, a_rD, preferred_element_type=jnp.float32)
        h_tr = (h_tr * scale_t1).astype(x_tD.dtype)
        return y_tE + jnp.dot(h_tr, b_rE, preferred_element_type=jnp.float32)

    pages = jnp.where(slot >= 0, pool.pages_S[slot], 0)
    return jax.lax.fori_loop(0, pages, add_page, y_tE)
