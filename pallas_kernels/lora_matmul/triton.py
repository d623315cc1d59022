"""The LoRA operator for NVIDIA GPUs, in Pallas-Triton: two launches for all parts of a product.

    shrink  h_UC[u * T + t, ranks] = x_TD[t, range u of D] @ A_RD[ranks, range u of D]^T
    expand  y_TE[t] += (scale * sum over u of h_UC[u * T + t, ranks]) @ B_RE[ranks]

A row tile's ranks in a part are those of the adapter it adds, page by page, then those of the one
it subtracts: one list, so that both branches share a block. Each launch has a fixed number of
programs, which loop over as much work as there is: tiles, ranks and adapters are run-time data,
and absent ones cost nothing. Partial sums are added in order: equal inputs give equal bits.

N parts, M row tiles, J = N * M lists of Q pages, U splits * T rows of partial sums, C = N * Q * 16
rank columns; other letters as in `api` and `layout`. Lower case is one block: t rows, d input
columns, r ranks, e output columns.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lora_matmul.layout import PAGE_RANKS, LoraPool, RowTiles
from pallas_kernels.lora_matmul.tiles import (
    LoraTile,
    ShrinkTile,
    lora_tile,
    power_of_two,
    refusals,
)

# Of one adapter in one linear; who loads adapters refuses higher ranks. A slot has room for as many
# pages as the pool, the partial sums only for this: one adapter that is added, one subtracted.
MAX_RANK = 256
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _RankLists:
    """The pages whose ranks each tile multiplies in each part. Lists are part after part.

    Attributes:
      page_F: `[J * Q]` int32, Q places a list; those after its end hold anything.
      pages_J: `[J]` int32 pages in a list, 0 for tiles that are not in use.
      plus_J: `[J]` int32 how many of them, the first ones, are of the adapter that is added.
      longest: scalar int32, the most pages of a list.
    """

    page_F: jax.Array
    pages_J: jax.Array
    plus_J: jax.Array
    longest: jax.Array

    @property
    def most_ranks(self) -> int:
        """Ranks of a list that is full: the rank columns of one part."""
        return self.page_F.shape[0] // self.pages_J.shape[0] * PAGE_RANKS


# Under a jit of its own, with the layer as an operand, a step of many layers traces and lowers this
# once a shape. XLA inlines it again, and then computes the rank lists once for all layers.
@functools.partial(jax.jit, static_argnames=("columns", "tile"))
def lora_matmul(
    y_TE: jax.Array,
    x_TD: jax.Array,
    pools: tuple[LoraPool, ...],
    tiles: RowTiles,
    layer: jax.Array,
    *,
    columns: tuple[int, ...],
    tile: LoraTile | None,
) -> jax.Array:
    """See `api.lora_matmul`, which has checked the shapes; `columns` are the parts' first ones."""
    (T, D), E = x_TD.shape, y_TE.shape[1]
    if tile is None:
        tile = lora_tile(rows=T, width=D, columns=E)
        tile = dataclasses.replace(tile, block_rows=max(16, power_of_two(tiles.block_rows)))
    _check(x_TD, y_TE, tiles, tile)
    block_pages = max(tile.shrink.block_ranks, tile.expand.block_ranks) // PAGE_RANKS
    lists = _rank_lists(pools, tiles, block_pages=block_pages)
    h_UC = _shrink(x_TD, pools, tiles, lists, layer, tile=tile)
    return _expand(y_TE, h_UC, pools, tiles, lists, layer, columns=columns, tile=tile)


def _check(x_TD: jax.Array, y_TE: jax.Array, tiles: RowTiles, tile: LoraTile) -> None:
    if x_TD.dtype != y_TE.dtype or x_TD.dtype not in DTYPES:
        raise NotImplementedError(
            f"the triton kernels take x_TD and y_TE both in one of bfloat16, float16 and float32, "
            f'not {x_TD.dtype} and {y_TE.dtype}; cast them or use implementation="xla"'
        )
    if tile.block_rows < tiles.block_rows:
        raise ValueError(
            f"row tiles of {tiles.block_rows} rows exceed the kernels' {tile.block_rows}: "
            "make them with RowTiles.of(block_rows=tile.block_rows)"
        )
    if faults := refusals(tile, itemsize=x_TD.dtype.itemsize):
        raise ValueError(f"{tile} is not legal: " + "; ".join(faults))


def _rank_lists(pools: tuple[LoraPool, ...], tiles: RowTiles, *, block_pages: int) -> _RankLists:
    """Joins the pages of each tile's branches; the same in all layers."""
    # All parts at once: these are launches of their own, once a step.
    most = min(MAX_RANK // PAGE_RANKS, max(pool.page_SW.shape[1] for pool in pools))
    pages_NS = jnp.stack([jnp.minimum(pool.pages_S, most) for pool in pools])
    page_NSW = jnp.stack([_cut_or_padded(pool.page_SW, most) for pool in pools])
    q_Q = jnp.arange(pl.cdiv(2 * most, block_pages) * block_pages)
    in_use_M = jnp.arange(tiles.first_M.shape[0]) < tiles.count

    def pages_of(slot_M):
        pages_NM = pages_NS.at[:, slot_M].get(mode="clip")
        return jnp.where(in_use_M & (slot_M >= 0), pages_NM, 0)

    plus_NM, minus_NM = pages_of(tiles.plus_M), pages_of(tiles.minus_M)
    plus_NMQ = jnp.broadcast_to(plus_NM[..., None], (*plus_NM.shape, q_Q.shape[0]))
    of_plus_NMQ = q_Q < plus_NMQ
    slot_NMQ = jnp.where(of_plus_NMQ, tiles.plus_M[:, None], tiles.minus_M[:, None])
    at_NMQ = jnp.where(of_plus_NMQ, q_Q, q_Q - plus_NMQ)
    part_NMQ = jnp.arange(len(pools))[:, None, None]
    page_NMQ = page_NSW.at[part_NMQ, slot_NMQ, at_NMQ].get(mode="clip")
    pages_NM = plus_NM + minus_NM
    return _RankLists(
        page_F=page_NMQ.reshape(-1),
        pages_J=pages_NM.reshape(-1),
        plus_J=plus_NM.reshape(-1),
        longest=jnp.max(pages_NM),
    )


def _cut_or_padded(page_SW: jax.Array, width: int) -> jax.Array:
    return jnp.pad(page_SW[:, :width], ((0, 0), (0, max(0, width - page_SW.shape[1]))))


def _shrink(x_TD, pools, tiles, lists, layer, *, tile) -> jax.Array:
    """Launches the shrink; sums of rows and ranks that do not exist are left unwritten."""
    (T, D), lists_count, cut = x_TD.shape, lists.pages_J.shape[0], tile.shrink
    splits = min(cut.splits, pl.cdiv(D, cut.block_k))
    most_items = lists_count * splits * (lists.most_ranks // cut.block_ranks)
    body = functools.partial(
        _shrink_body,
        pages=tuple(_pages(pool) for pool in pools),
        block_rows=tile.block_rows,
        cut=dataclasses.replace(cut, splits=splits),
    )
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((splits * T, len(pools) * lists.most_ranks), jnp.float32),
        grid=(min(cut.programs, most_items),),
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        name="lora_shrink",
    )(layer, tiles, lists, x_TD, tuple(pool.a_RD for pool in pools))


def _shrink_body(layer, tiles, lists, x_TD, a_refs, h_UC, *, pages, block_rows, cut: ShrinkTile):
    T, parts, M = x_TD.shape[0], len(a_refs), tiles.first_M.shape[0]
    blocks = pl.cdiv(lists.longest[...] * PAGE_RANKS, cut.block_ranks)

    def multiply(item):
        # Neighbouring programs share rows of x.
        item, split = item // cut.splits, item % cut.splits
        item, block = item // blocks, item % blocks
        m, part = item // parts, item % parts
        j = part * M + m
        rank_r, page_r, in_list_r = _ranks(lists, j, block, block_ranks=cut.block_ranks)
        row_t, in_tile_t = _rows(tiles, m, block_rows=block_rows)
        for i, a_RD in enumerate(a_refs):

            @pl.when((part == i) & (block * cut.block_ranks < lists.pages_J[j] * PAGE_RANKS))
            def _(i=i, a_RD=a_RD):
                row_r = (layer[...] * pages[i] + page_r) * PAGE_RANKS + rank_r % PAGE_RANKS
                h_tr = _dot_over_inputs(
                    x_TD, a_RD, row_t, row_r, in_tile_t, in_list_r, split=split, cut=cut
                )
                at_t, at_r = split * T + row_t, i * lists.most_ranks + rank_r
                plgpu.store(h_UC.at[at_t[:, None], at_r[None, :]], h_tr, mask=in_tile_t[:, None])

    _for_each_item(tiles.count[...] * parts * blocks * cut.splits, multiply)


def _dot_over_inputs(x_TD, a_RD, row_t, row_r, in_tile_t, in_list_r, *, split, cut: ShrinkTile):
    """`x @ A^T` over one split of the input columns, `[t, r]` float32."""
    D = x_TD.shape[1]
    steps = pl.cdiv(D, cut.block_k)

    def step(i, h_tr):
        at_d = i * cut.block_k + jnp.arange(cut.block_k)
        mask_td, mask_rd = in_tile_t[:, None], in_list_r[:, None]
        if D % cut.block_k:
            mask_td, mask_rd = mask_td & (at_d < D)[None, :], mask_rd & (at_d < D)[None, :]
        x_td = plgpu.load(x_TD.at[row_t[:, None], at_d[None, :]], mask=mask_td, other=0)
        a_rd = plgpu.load(a_RD.at[row_r[:, None], at_d[None, :]], mask=mask_rd, other=0)
        return h_tr + _dot(x_td, a_rd.astype(x_td.dtype), contract=(1, 1))

    # Widths need not divide by the splits: some do a step more than others.
    start, stop = split * steps // cut.splits, (split + 1) * steps // cut.splits
    zeros_tr = jnp.zeros((row_t.shape[0], row_r.shape[0]), jnp.float32)
    return jax.lax.fori_loop(start, stop, step, zeros_tr)


def _expand(y_TE, h_UC, pools, tiles, lists, layer, *, columns, tile) -> jax.Array:
    """Launches the expand, in place on `y_TE`."""
    cut = tile.expand
    body = functools.partial(
        _expand_body,
        columns=columns,
        pages=tuple(_pages(pool) for pool in pools),
        block_rows=tile.block_rows,
        cut=cut,
    )
    scale_refs, b_refs = (tuple(getattr(p, name) for p in pools) for name in ("scale_LS", "b_RE"))
    blocks = sum(pl.cdiv(b_RE.shape[1], cut.block_columns) for b_RE in b_refs)
    operands = (y_TE, layer, tiles, lists, h_UC, scale_refs, b_refs)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(y_TE.shape, y_TE.dtype),
        grid=(min(cut.programs, tiles.first_M.shape[0] * blocks),),
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        input_output_aliases={0: 0},
        name="lora_expand",
    )(*operands)


def _expand_body(
    y_TE, layer, tiles, lists, h_UC, scale_refs, b_refs, out_TE, *, columns, pages, block_rows, cut
):
    M = tiles.first_M.shape[0]
    blocks_of_part = [pl.cdiv(b_RE.shape[1], cut.block_columns) for b_RE in b_refs]
    blocks = sum(blocks_of_part)

    def multiply(item):
        m, block = item // blocks, item % blocks
        row_t, in_tile_t = _rows(tiles, m, block_rows=block_rows)
        for i, (scale_LS, b_RE) in enumerate(zip(scale_refs, b_refs, strict=True)):
            j, first_block = i * M + m, sum(blocks_of_part[:i])
            in_part = (block >= first_block) & (block < first_block + blocks_of_part[i])

            @pl.when(in_part & (lists.pages_J[j] > 0))
            def _(i=i, scale_LS=scale_LS, b_RE=b_RE, j=j, first_block=first_block):
                at_e = (block - first_block) * cut.block_columns + jnp.arange(cut.block_columns)
                mask_te = in_tile_t[:, None] & (at_e < b_RE.shape[1])[None, :]
                y_at = (row_t[:, None], (columns[i] + at_e)[None, :])
                # Loaded first, for its latency; added last, in the layout in which it is stored.
                y_te = plgpu.load(y_TE.at[*y_at], mask=mask_te, other=0)

                def multiply_ranks(k, sum_te):
                    rank_r, page_r, in_list_r = _ranks(lists, j, k, block_ranks=cut.block_ranks)
                    mask_tr = in_tile_t[:, None] & in_list_r[None, :]
                    at_r = i * lists.most_ranks + rank_r
                    h_tr = _sum_of_splits(h_UC, row_t, at_r, mask_tr, T=y_TE.shape[0])
                    scale_r = _scales(scale_LS, tiles, lists, layer, rank_r, m=m, j=j)
                    h_tr = (h_tr * scale_r[None, :]).astype(y_te.dtype)
                    row_r = (layer[...] * pages[i] + page_r) * PAGE_RANKS + rank_r % PAGE_RANKS
                    mask_re = in_list_r[:, None] & (at_e < b_RE.shape[1])[None, :]
                    b_re = plgpu.load(b_RE.at[row_r[:, None], at_e[None, :]], mask=mask_re, other=0)
                    return sum_te + _dot(h_tr, b_re.astype(h_tr.dtype), contract=(1, 0))

                steps = pl.cdiv(lists.pages_J[j] * PAGE_RANKS, cut.block_ranks)
                zeros_te = jnp.zeros(mask_te.shape, jnp.float32)
                sum_te = jax.lax.fori_loop(0, steps, multiply_ranks, zeros_te)
                y_te = (y_te.astype(jnp.float32) + sum_te).astype(out_TE.dtype)
                plgpu.store(out_TE.at[*y_at], y_te, mask=mask_te)

    _for_each_item(tiles.count[...] * blocks, multiply)


def _sum_of_splits(h_UC, row_t, at_r, mask_tr, *, T: int) -> jax.Array:
    """The partial sums of T rows each, added up in order: `[t, r]` float32."""
    h_tr = jnp.zeros(mask_tr.shape, jnp.float32)
    for split in range(h_UC.shape[0] // T):  # unrolled, so that all loads are in flight
        at_t = split * T + row_t
        h_tr += plgpu.load(h_UC.at[at_t[:, None], at_r[None, :]], mask=mask_tr, other=0)
    return h_tr


def _scales(scale_LS, tiles, lists, layer, rank_r, *, m, j) -> jax.Array:
    """Of each rank of list j, which is tile m's: its adapter's, negative if that is subtracted."""
    plus, minus = (
        scale_LS[layer[...], jnp.maximum(slot, 0)] for slot in (tiles.plus_M[m], tiles.minus_M[m])
    )
    return jnp.where(rank_r < lists.plus_J[j] * PAGE_RANKS, plus, -minus)


def _for_each_item(items, do) -> None:
    """Runs `do(item)` for this program's share of `items`, a run-time number."""
    program, programs = pl.program_id(0), pl.num_programs(0)

    def step(i, carry):
        do(program + i * programs)
        return carry

    jax.lax.fori_loop(0, pl.cdiv(items - program, programs), step, None)


def _rows(tiles, m, *, block_rows: int):
    """The rows of tile m, and which of them it has."""
    i_t = jnp.arange(block_rows)
    return tiles.first_M[m] + i_t, i_t < tiles.len_M[m]


def _ranks(lists, j, block, *, block_ranks: int):
    """Of one block of list j: places in the list, their pages, and which of them exist."""
    rank_r = block * block_ranks + jnp.arange(block_ranks)
    page_r = plgpu.load(
        lists.page_F.at[j * (lists.most_ranks // PAGE_RANKS) + rank_r // PAGE_RANKS]
    )
    return rank_r, page_r, rank_r < lists.pages_J[j] * PAGE_RANKS


def _pages(pool: LoraPool) -> int:
    """Pages of one layer."""
    return pool.a_RD.shape[0] // (pool.scale_LS.shape[0] * PAGE_RANKS)


def _dot(a, b, *, contract: tuple[int, int]) -> jax.Array:
    # Without the precision, Triton would round float32 to 10 bits first.
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
