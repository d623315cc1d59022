"""The LoRA operator in plain XLA: loops over row tiles and the rank pages of each.

Trip counts are run-time data, so one executable serves any number of adapters of any ranks and
time follows the rows and the ranks in use. The first rows of a step bring an adapter each where
they are decodes: all of them are multiplied with one page at a time, masked to its owner's. What
follows is a prompt's: tall tiles of one adapter, several pages at a time.

I places in a tile's list of pages, k pages multiplied at once, F pages of the first rows.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.lora_matmul.layout import PAGE_RANKS, LoraPool, RowTiles

BLOCK_ROWS = 160
FIRST_ROWS = 16
GROUP_PAGES = 4  # pages multiplied at once with a tall tile

# No index is negative; code for such took a quarter of the time that the loops took to compile.
_slice = functools.partial(jax.lax.dynamic_slice, allow_negative_indices=False)
_update = functools.partial(jax.lax.dynamic_update_slice, allow_negative_indices=False)
_IN_BOUNDS = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


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
    # A constant would end up in the code of every loop, and each layer's be compiled anew.
    branches = _Branches(pools, columns, tiles, jax.lax.optimization_barrier(layer))
    T, first = x_TD.shape[0], min(FIRST_ROWS, x_TD.shape[0])
    # A CPU multiplies few rows faster in float32, the type of the sums.
    y_tE, x_tD = (rows[:first].astype(jnp.float32) for rows in (y_TE, x_TD))
    y_TE = y_TE.at[:first].set(_add_to_first(y_tE, x_tD, branches).astype(y_TE.dtype))
    return y_TE if first == T else _add_to_rest(y_TE, x_TD, branches)


class _Branches:
    """The pages that each row tile multiplies: its adapter's, then those of the folded one.

    Only `add` depends on the layer: XLA computes the tables once a step.

    Attributes:
      tiles: the row tiles.
      pages_M: how many pages there are, of the linear that has most.
      most_pages: that there can be.
    """

    def __init__(self, pools: tuple[LoraPool, ...], columns, tiles: RowTiles, layer: jax.Array):
        self.tiles, self._layer, self._parts = tiles, layer, []
        pages_S = functools.reduce(jnp.maximum, [pool.pages_S for pool in pools])
        added_M, subtracted_M = (
            jnp.where(slot_M >= 0, pages_S[slot_M], 0) for slot_M in (tiles.plus_M, tiles.minus_M)
        )
        self.pages_M = added_M + subtracted_M
        self.most_pages = 2 * max(pool.page_SW.shape[1] for pool in pools)
        i_I = jnp.arange(self.most_pages + GROUP_PAGES)  # a group may reach past the last page
        adds_MI = i_I < added_M[:, None]
        slot_MI = jnp.where(adds_MI, tiles.plus_M[:, None], tiles.minus_M[:, None])
        nth_MI = jnp.where(adds_MI, i_I, i_I - added_M[:, None])
        self._slot_MI = jnp.maximum(slot_MI, 0)
        for pool, column in zip(pools, columns, strict=True):
            exists_MI = (slot_MI >= 0) & (nth_MI < pool.pages_S[slot_MI])
            page_MI = jnp.where(exists_MI, pool.page_SW[slot_MI, nth_MI], 0)
            sign_MI = jnp.where(exists_MI, jnp.where(adds_MI, 1.0, -1.0), 0.0)
            self._parts.append((pool, column, page_MI, sign_MI))

    def add(self, y_TE, x_tD, mine_t, *, start, m, i, pages: int):
        """Adds `pages` pages of tile m, from the i-th on, to its own among the rows of `x_tD`,
        which begin at `start` in `y_TE`."""
        for pool, column, page_MI, sign_MI in self._parts:
            page_k, sign_k, slot_k = (
                _slice(table_MI, (m, i), (1, pages))[0]
                for table_MI in (page_MI, sign_MI, self._slot_MI)
            )
            scale_k = sign_k * pool.scale_LS.at[self._layer, slot_k].get(**_IN_BOUNDS)
            scale_tr = mine_t[:, None] * jnp.repeat(scale_k, PAGE_RANKS)
            a_rD, b_rE = (
                self._load(pool, rows, page_k, x_tD.dtype) for rows in (pool.a_RD, pool.b_RE)
            )
            h_tr = jnp.einsum("tD,rD->tr", x_tD, a_rD, preferred_element_type=jnp.float32)
            h_tr = (h_tr * scale_tr).astype(x_tD.dtype)
            d_tE = jnp.dot(h_tr, b_rE, preferred_element_type=jnp.float32)
            sum_tE = _slice(y_TE, (start, column), d_tE.shape) + d_tE
            y_TE = _update(y_TE, sum_tE.astype(y_TE.dtype), (start, column))
        return y_TE

    def _load(self, pool: LoraPool, rows_RD, page_k, dtype):
        pages_PrD = rows_RD.reshape(-1, PAGE_RANKS, rows_RD.shape[1])
        pages_krD = pages_PrD.at[self._layer * pool.layer_pages + page_k].get(**_IN_BOUNDS)
        return pages_krD.reshape(-1, rows_RD.shape[1]).astype(dtype)


def _add_to_first(y_tE, x_tD, branches: _Branches):
    """Adds all tiles' updates to the few first rows, page by page."""
    tiles, rows = branches.tiles, x_tD.shape[0]
    # Tiles hold a row at least, so no more of them begin here than there are rows.
    here_M = (tiles.first_M[:rows] < rows) & (jnp.arange(rows) < tiles.count)
    pages_M = jnp.where(here_M, branches.pages_M[:rows], 0)
    wanted_MI = jnp.arange(branches.most_pages) < pages_M[:, None]
    m_F, i_F = jnp.nonzero(wanted_MI, size=wanted_MI.size, fill_value=0)

    def add_page(f, y_tE):
        m = _at(m_F, f)
        row_t = jnp.arange(rows) - _at(tiles.first_M, m)
        mine_t = (row_t >= 0) & (row_t < _at(tiles.len_M, m))
        return branches.add(y_tE, x_tD, mine_t, start=0, m=m, i=_at(i_F, f), pages=1)

    return jax.lax.fori_loop(0, wanted_MI.sum(), add_page, y_tE)


def _add_to_rest(y_TE, x_TD, branches: _Branches):
    """Adds the updates of the rows behind the first, tile by tile."""
    (T, D), tiles = x_TD.shape, branches.tiles
    rows = min(tiles.block_rows, T - FIRST_ROWS)

    def add_tile(m, y_TE):
        first, end = _at(tiles.first_M, m), _at(tiles.first_M, m) + _at(tiles.len_M, m)
        # A block may not stick out: it starts earlier, and masks what is not its own.
        start = jnp.clip(first, FIRST_ROWS, T - rows)
        row_t = start + jnp.arange(rows)
        mine_t = (row_t >= FIRST_ROWS) & (row_t >= first) & (row_t < end)
        x_tD = _slice(x_TD, (start, 0), (rows, D))
        add = functools.partial(branches.add, x_tD=x_tD, mine_t=mine_t, start=start, m=m)
        pages = _at(branches.pages_M, m)
        groups = (pages + 1) // GROUP_PAGES  # three pages take as long as four
        y_TE = jax.lax.fori_loop(
            0, groups, lambda g, y: add(y, i=g * GROUP_PAGES, pages=GROUP_PAGES), y_TE
        )
        return jax.lax.fori_loop(
            groups * GROUP_PAGES, pages, lambda i, y: add(y, i=i, pages=1), y_TE
        )

    used_M = jnp.arange(tiles.first_M.size) < tiles.count
    done = jnp.sum(used_M & (tiles.first_M + tiles.len_M <= FIRST_ROWS))
    return jax.lax.fori_loop(done, tiles.count, add_tile, y_TE)


def _at(x_M, m):
    return _slice(x_M, (m,), (1,))[0]
