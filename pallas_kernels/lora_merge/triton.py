"""Merging as one Pallas-Triton launch: a copy of the weights, with the update added on the way.

A program owns one block of the output. The columns are cut into spans, one a part and one a gap
between parts, and no block crosses two. d and e are one block of D and E, r the rank rows of one
step of the loop over the adapter's pages; the other letters are those of `api`.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lora_matmul.layout import PAGE_RANKS
from pallas_kernels.lora_merge.tiles import MergeTile, default_tile


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    """Columns `[column, stop)`, done by the blocks from `block` on; `part` is None in a gap."""

    part: int | None
    column: int
    stop: int
    block: int

    def blocks(self, tile: MergeTile) -> int:
        return pl.cdiv(self.stop - self.column, tile.block_e)


def _spans(columns, widths, E: int, tile: MergeTile) -> Iterator[_Span]:
    done, block = 0, 0
    parts = [*enumerate(zip(columns, widths, strict=True)), (None, (E, 0))]
    for part, (column, width) in parts:
        for owner, first, stop in ((None, done, column), (part, column, column + width)):
            if first < stop:
                span = _Span(part=owner, column=first, stop=stop, block=block)
                block += span.blocks(tile)
                yield span
        done = column + width


def _update(pool, layer_slot, row_d, column_e, *, tile):
    """`[d, e]` float32, of one block of one part; `column_e` counts from the part's first."""
    a_RD, b_RE, scale_LS, page_SW, pages_S = pool
    layer, slot = layer_slot[0], layer_slot[1]
    pages = pages_S[slot]
    layer_page = layer * (a_RD.shape[0] // PAGE_RANKS // scale_LS.shape[0])
    rank_r = jnp.arange(tile.pages * PAGE_RANKS)

    def load(rows_RX, row_r, used_r, column_x):
        """Rank rows by columns, zeros outside the adapter or the linear."""
        used_rx = used_r[:, None] & (column_x < rows_RX.shape[1])[None, :]
        index = jnp.broadcast_arrays(row_r[:, None], column_x[None, :])
        return plgpu.load(rows_RX.at[*index], mask=used_rx, other=0)

    def add_pages(i, update_de):
        nth_r = i * tile.pages + rank_r // PAGE_RANKS
        used_r = nth_r < pages
        page_r = (
            plgpu.load(page_SW.at[jnp.full_like(nth_r, slot), nth_r], mask=used_r, other=0)
            + layer_page
        )
        row_r = page_r * PAGE_RANKS + rank_r % PAGE_RANKS
        a_rd, b_re = load(a_RD, row_r, used_r, row_d), load(b_RE, row_r, used_r, column_e)
        return update_de + jax.lax.dot_general(
            a_rd,
            b_re,
            (((0,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    zeros_de = jnp.zeros((tile.block_d, tile.block_e), jnp.float32)
    update_de = jax.lax.fori_loop(0, pl.cdiv(pages, tile.pages), add_pages, zeros_de)
    return scale_LS[layer, slot] * update_de


def _body(layer_slot, _, base_DE, *refs, spans, tile):
    *pool_refs, out_DE = refs
    row_block, column_block = pl.program_id(0), pl.program_id(1)
    rows = pl.ds(row_block * tile.block_d, tile.block_d)
    row_d = rows.start + jnp.arange(tile.block_d)

    def write_block(span: _Span):
        first = (column_block - span.block) * tile.block_e
        column_e = first + jnp.arange(tile.block_e)
        columns = pl.ds(span.column + first, tile.block_e)
        inside_de = (row_d < base_DE.shape[0])[:, None] & (column_e < span.stop - span.column)[
            None, :
        ]
        # Before the loop, so that the wait for it overlaps with the adapter's.
        out_de = plgpu.load(base_DE.at[rows, columns], mask=inside_de, other=0)
        if span.part is not None:
            pool = pool_refs[5 * span.part : 5 * span.part + 5]
            update_de = _update(pool, layer_slot, row_d, column_e, tile=tile)
            out_de = (out_de.astype(jnp.float32) + update_de).astype(out_de.dtype)
        plgpu.store(out_DE.at[rows, columns], out_de, mask=inside_de)

    for span in spans:
        last = span.block + span.blocks(tile)
        mine = (column_block >= span.block) & (column_block < last)
        pl.when(mine)(functools.partial(write_block, span))


@functools.partial(jax.jit, static_argnames=("columns", "tile"), donate_argnames="merged_DE")
def lora_merge(merged_DE, base_DE, pools, layer, slot, *, columns, tile):
    """See `api.lora_merge`, which has checked the shapes."""
    (D, E), tile = base_DE.shape, tile or default_tile(base_DE.dtype)
    spans = tuple(_spans(columns, [pool.b_RE.shape[1] for pool in pools], E, tile))
    column_blocks = spans[-1].block + spans[-1].blocks(tile)
    pool_arrays = [x for p in pools for x in (p.a_RD, p.b_RE, p.scale_LS, p.page_SW, p.pages_S)]
    return pl.pallas_call(
        functools.partial(_body, spans=spans, tile=tile),
        out_shape=jax.ShapeDtypeStruct((D, E), base_DE.dtype),
        grid=(pl.cdiv(D, tile.block_d), column_blocks),
        input_output_aliases={1: 0},
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        name="lora_merge",
    )(jnp.stack([layer, slot]), merged_DE, base_DE, *pool_arrays)
