"""The LoRA operator in plain XLA: loops over row tiles and the rank pages of each.

Trip counts are run-time data, so one executable serves any number of adapters of any ranks and
time follows the rows and the ranks in use. The first rows of a step bring an adapter each where
they are decodes: all of them are multiplied with one page at a time, masked to its owner's. What
follows is a prompt's: tall tiles of one adapter, several pages at a time.

I branch pages of a tile, one after the other, k those multiplied at once, F pages of first rows.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.lora_matmul.layout import PAGE_RANKS, LoraPool, RowTiles

BLOCK_ROWS = 160
FIRST_ROWS = 16
GROUP_PAGES = 4  # pages multiplied at once with a tall tile


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
    branches, parts = _Branches(pools, tiles, layer), tuple(zip(pools, columns, strict=True))
    first = min(FIRST_ROWS, x_TD.shape[0])
    sums = [
        y_TE[:first, column : column + pool.b_RE.shape[1]].astype(jnp.float32)
        for pool, column in parts
    ]
    sums = _add_to_first(sums, x_TD[:first], branches)
    for y_tE, (_, column) in zip(sums, parts, strict=True):
        y_TE = y_TE.at[:first, column : column + y_tE.shape[1]].set(y_tE.astype(y_TE.dtype))
    return y_TE if x_TD.shape[0] == first else _add_to_rest(y_TE, x_TD, branches, columns)


class _Branches:
    """The pages that each row tile multiplies: its adapter's, then those of the folded one.

    Nothing but the loads depends on the layer, so that XLA computes the rest once a step.

    Attributes:
      pages_M: how many pages there are, of the linear that has most.
      most_pages: that there can be.
    """

    def __init__(self, pools: tuple[LoraPool, ...], tiles: RowTiles, layer: jax.Array):
        self.pools, self.tiles, self._layer = pools, tiles, layer
        pages_S = functools.reduce(jnp.maximum, [pool.pages_S for pool in pools])
        added_M, subtracted_M = (
            jnp.where(slot_M >= 0, pages_S[slot_M], 0) for slot_M in (tiles.plus_M, tiles.minus_M)
        )
        self.pages_M = added_M + subtracted_M
        self.most_pages = 2 * max(pool.page_SW.shape[1] for pool in pools)
        i_I = jnp.arange(self.most_pages + GROUP_PAGES)  # a group may reach past the last page
        adds_MI = i_I < added_M[:, None]
        self._slot_MI = jnp.where(adds_MI, tiles.plus_M[:, None], tiles.minus_M[:, None])
        nth_MI = jnp.where(adds_MI, i_I, i_I - added_M[:, None])
        self._page_MI, self._sign_MI = [], []
        for pool in pools:
            exists_MI = (self._slot_MI >= 0) & (nth_MI < pool.pages_S[self._slot_MI])
            self._page_MI.append(jnp.where(exists_MI, pool.page_SW[self._slot_MI, nth_MI], 0))
            self._sign_MI.append(jnp.where(exists_MI, jnp.where(adds_MI, 1.0, -1.0), 0.0))

    def product(self, part: int, x_tD: jax.Array, mine_t: jax.Array, *, m, i, count: int):
        """`count` pages of tile m from the i-th on, times those rows that are its own; float32."""
        pool = self.pools[part]
        page_k, sign_k, slot_k = (
            jax.lax.dynamic_slice(table_MI, (m, i), (1, count))[0]
            for table_MI in (self._page_MI[part], self._sign_MI[part], self._slot_MI)
        )
        pages = pool.a_RD.shape[0] // pool.scale_LS.shape[0] // PAGE_RANKS
        a_rD, b_rE = (
            rows.reshape(-1, PAGE_RANKS, rows.shape[1])
            .at[self._layer * pages + page_k]
            .get(mode="promise_in_bounds")
            .reshape(-1, rows.shape[1])
            .astype(x_tD.dtype)
            for rows in (pool.a_RD, pool.b_RE)
        )
        scale_r = jnp.repeat(sign_k * pool.scale_LS[self._layer, slot_k], PAGE_RANKS)
        h_tr = jnp.einsum("tD,rD->tr", x_tD, a_rD, preferred_element_type=jnp.float32)
        h_tr = (h_tr * (mine_t[:, None] * scale_r)).astype(x_tD.dtype)
        return jnp.dot(h_tr, b_rE, preferred_element_type=jnp.float32)


def _add_to_first(sums, x_tD, branches: _Branches):
    """Adds all tiles' updates to the linears' rows `sums`, page by page."""
    # A CPU multiplies few rows faster in float32, the type of the sums.
    tiles, rows, x_tD = branches.tiles, x_tD.shape[0], x_tD.astype(jnp.float32)
    # Tiles hold a row at least, so no more of them begin here than there are rows.
    here_M = (tiles.first_M[:rows] < rows) & (jnp.arange(rows) < tiles.count)
    pages_M = jnp.where(here_M, branches.pages_M[:rows], 0)
    wanted_MI = jnp.arange(branches.most_pages) < pages_M[:, None]
    m_F, i_F = jnp.nonzero(wanted_MI, size=wanted_MI.size, fill_value=0)

    def add_page(f, sums):
        m = m_F[f]
        row_t = jnp.arange(rows) - tiles.first_M[m]
        mine_t = (row_t >= 0) & (row_t < tiles.len_M[m])
        return [
            y_tE + branches.product(part, x_tD, mine_t, m=m, i=i_F[f], count=1)
            for part, y_tE in enumerate(sums)
        ]

    return jax.lax.fori_loop(0, wanted_MI.sum(), add_page, sums)


def _add_to_rest(y_TE, x_TD, branches: _Branches, columns):
    """Adds the updates of the rows behind the first, tile by tile."""
    T, tiles = x_TD.shape[0], branches.tiles
    rows = min(tiles.block_rows, T - FIRST_ROWS)

    def add_tile(m, y_TE):
        # A block may not stick out: it starts earlier, and masks what is not its own.
        start = jnp.clip(tiles.first_M[m], FIRST_ROWS, T - rows)
        row_t = start + jnp.arange(rows)
        mine_t = (row_t >= FIRST_ROWS) & (row_t >= tiles.first_M[m])
        mine_t &= row_t < tiles.first_M[m] + tiles.len_M[m]
        x_tD = jax.lax.dynamic_slice_in_dim(x_TD, start, rows)

        def add_pages(i, y_TE, *, count):
            for part, column in enumerate(columns):
                d_tE = branches.product(part, x_tD, mine_t, m=m, i=i, count=count)
                y_tE = jax.lax.dynamic_slice(y_TE, (start, column), d_tE.shape)
                sum_tE = (y_tE + d_tE).astype(y_TE.dtype)
                y_TE = jax.lax.dynamic_update_slice(y_TE, sum_tE, (start, column))
            return y_TE

        pages = branches.pages_M[m]
        groups = (pages + 1) // GROUP_PAGES  # three pages take as long as four
        y_TE = jax.lax.fori_loop(
            0, groups, lambda g, y: add_pages(g * GROUP_PAGES, y, count=GROUP_PAGES), y_TE
        )
        add_one = functools.partial(add_pages, count=1)
        return jax.lax.fori_loop(groups * GROUP_PAGES, pages, add_one, y_TE)

    done = jnp.sum(tiles.first_M + tiles.len_M <= FIRST_ROWS)
    return jax.lax.fori_loop(jnp.minimum(done, tiles.count), tiles.count, add_tile, y_TE)
