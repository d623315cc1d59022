"""Merging as one Pallas-Triton launch: a copy of the weights, with the update added on the way.

A program owns some rows and, one after the other, some blocks of columns. The columns are cut into
spans, one a part and one a gap between parts, and no program crosses two. The base goes through the
matmul unit for its loads, see `identity`. d and e are one block of D and E, r the rank rows of one
step; the other letters are those of `api`.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lora_matmul.layout import PAGE_RANKS
from pallas_kernels.lora_matmul.triton_dot import dot, identity
from pallas_kernels.lora_merge.tiles import MergeTile, default_tile


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    """Columns `[column, stop)`, done by the programs from `first` on; `part` is None in a gap."""

    part: int | None
    column: int
    stop: int
    first: int

    def programs(self, tile: MergeTile) -> int:
        return pl.cdiv(self.stop - self.column, tile.block_e * tile.blocks)


def _spans(columns, widths, E: int, tile: MergeTile) -> Iterator[_Span]:
    done, program = 0, 0
    parts = [*enumerate(zip(columns, widths, strict=True)), (None, (E, 0))]
    for part, (column, width) in parts:
        for owner, first, stop in ((None, done, column), (part, column, column + width)):
            if first < stop:
                span = _Span(part=owner, column=first, stop=stop, first=program)
                program += span.programs(tile)
                yield span
        done = column + width


def _body(layer_slot, _, base_DE, pools, out_DE, *, spans, tile: MergeTile):
    row_block, column_program = pl.program_id(0), pl.program_id(1)
    row_d = row_block * tile.block_d + jnp.arange(tile.block_d)

    def write(span: _Span):
        first_e = (column_program - span.first) * tile.blocks * tile.block_e

        def columns_of(n):
            """Of a block: counted from the span's first, and which of them it has."""
            column_e = first_e + n * tile.block_e + jnp.arange(tile.block_e)
            return column_e, column_e < span.stop - span.column

        refs_of_span = (base_DE, out_DE, row_d, columns_of, span.column)
        if span.part is None:
            _copy(*refs_of_span, tile=tile)
        else:
            _merge(layer_slot, pools[span.part], *refs_of_span, tile=tile)

    for span in spans:
        last = span.first + span.programs(tile)
        mine = (column_program >= span.first) & (column_program < last)
        pl.when(mine)(functools.partial(write, span))


def _copy(base_DE, out_DE, row_d, columns_of, first: int, *, tile: MergeTile) -> None:
    is_row_d = row_d < base_DE.shape[0]

    def copy_block(n, carry):
        column_e, is_column_e = columns_of(n)
        at = (row_d[:, None], (first + column_e)[None, :])
        mask_de = is_row_d[:, None] & is_column_e[None, :]
        base_de = plgpu.load(base_DE.at[*at], mask=mask_de, other=0)
        plgpu.store(out_DE.at[*at], base_de, mask=mask_de)
        return carry

    jax.lax.fori_loop(0, tile.blocks, copy_block, 0)


def _merge(
    layer_slot, pool, base_DE, out_DE, row_d, columns_of, first: int, *, tile: MergeTile
) -> None:
    layer, slot = layer_slot[0], layer_slot[1]
    pages, scale = pool.pages_S[slot], pool.scale_LS[layer, slot]
    layer_page = layer * pool.layer_pages
    is_row_d, rank_r = row_d < base_DE.shape[0], jnp.arange(tile.pages * PAGE_RANKS)
    identity_ee = identity(tile.block_e, base_DE.dtype)
    steps = jnp.maximum(pl.cdiv(pages, tile.pages), 1)  # one copies, where there are no pages

    def add(i, sum_de):
        n, k = jax.lax.div(i, steps), jax.lax.rem(i, steps)
        column_e, is_column_e = columns_of(n)
        nth_r = k * tile.pages + rank_r // PAGE_RANKS
        used_r = nth_r < pages
        slot_at = pool.page_SW.at[jnp.full_like(nth_r, slot), nth_r]
        page_r = plgpu.load(slot_at, mask=used_r, other=0) + layer_page
        row_r = page_r * PAGE_RANKS + rank_r % PAGE_RANKS
        at = (row_d[:, None], (first + column_e)[None, :])
        ends_de = is_row_d[:, None] & is_column_e[None, :] & (k == steps - 1)
        base_de = plgpu.load(base_DE.at[*at], mask=ends_de, other=0)
        a_at, b_at = (row_r[:, None], row_d[None, :]), (row_r[:, None], column_e[None, :])
        a_rd = plgpu.load(pool.a_RD.at[*a_at], mask=used_r[:, None] & is_row_d[None, :], other=0)
        b_re = plgpu.load(pool.b_RE.at[*b_at], mask=used_r[:, None] & is_column_e[None, :], other=0)
        # One accumulator, so that blocks can be large: scaled before the base comes in.
        sum_de = jnp.where(k == 0, 0, sum_de) + dot(a_rd, b_re, contract=(0, 0))
        sum_de = jnp.where(k == steps - 1, scale * sum_de, sum_de)
        sum_de += dot(base_de, identity_ee, contract=(1, 0))
        plgpu.store(out_DE.at[*at], sum_de.astype(out_DE.dtype), mask=ends_de)
        return sum_de

    zeros_de = jnp.zeros((tile.block_d, tile.block_e), jnp.float32)
    jax.lax.fori_loop(0, tile.blocks * steps, add, zeros_de)


@functools.partial(jax.jit, static_argnames=("columns", "tile"), donate_argnames="merged_DE")
def lora_merge(merged_DE, base_DE, pools, layer, slot, *, columns, tile):
    """See `api.lora_merge`, which has checked the shapes."""
    (D, E), tile = base_DE.shape, tile or default_tile(base_DE.dtype)
    spans = tuple(_spans(columns, [pool.b_RE.shape[1] for pool in pools], E, tile))
    column_programs = spans[-1].first + spans[-1].programs(tile)
    return pl.pallas_call(
        functools.partial(_body, spans=spans, tile=tile),
        out_shape=jax.ShapeDtypeStruct((D, E), base_DE.dtype),
        grid=(pl.cdiv(D, tile.block_d), column_programs),
        input_output_aliases={1: 0},
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        name="lora_merge",
    )(jnp.stack([layer, slot]), merged_DE, base_DE, pools)
