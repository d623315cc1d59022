"""The first half of the LoRA operator for NVIDIA GPUs: `h = scale * x @ A^T`, of all parts.

    h_UC[u * T + t, ranks] = scale * x_TD[t, range u of D] @ A_RD[ranks, range u of D]^T

U splits * T rows of partial sums, C rank columns of all parts; other letters as in `api`, `layout`
and `rank_tables`. Lower case is one block: t rows, d input columns, r ranks.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lora_matmul.layout import PAGE_RANKS, LoraPool
from pallas_kernels.lora_matmul.rank_tables import (
    TileRow,
    for_each_tile,
    page_ids,
    pool_rows,
    ranks_of,
    rows_of,
)
from pallas_kernels.lora_matmul.tiles import ShrinkTile
from pallas_kernels.lora_matmul.triton_dot import dot


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shrink:
    """How the work is shared among programs, and what each of them does.

    Attributes:
      pages: of a layer, in the pool of each part.
      list_ranks: columns of h that each part has.
      block_rows: of a block; no fewer than of a row tile.
      row_programs: along the rows; each does every so many-th row tile.
      splits: ranges of the input columns.
      split_steps: steps of a range.
      cut: the rest.
    """

    pages: tuple[int, ...]
    list_ranks: int
    block_rows: int
    row_programs: int
    splits: int
    split_steps: int
    cut: ShrinkTile

    @classmethod
    def of(
        cls,
        pools: Sequence[LoraPool],
        *,
        list_ranks: int,
        block_rows: int,
        row_programs: int,
        cut: ShrinkTile,
    ) -> "Shrink":
        steps = pl.cdiv(pools[0].a_RD.shape[1], cut.block_k)
        split_steps = pl.cdiv(steps, cut.splits)
        return cls(
            pages=tuple(pool.layer_pages for pool in pools),
            list_ranks=list_ranks,
            block_rows=block_rows,
            row_programs=row_programs,
            splits=pl.cdiv(steps, split_steps),
            split_steps=split_steps,
            cut=cut,
        )

    @property
    def grid(self) -> tuple[int, int, int]:
        """Neighbouring programs share rows of x."""
        return len(self.pages) * self.cut.rank_programs, self.splits, self.row_programs

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    def place(self, program) -> tuple[Any, Any, Any]:
        """In the grid, of programs that are numbered along it."""
        of_parts, splits, _ = self.grid
        rest = jax.lax.div(program, of_parts)
        return jax.lax.rem(program, of_parts), jax.lax.rem(rest, splits), jax.lax.div(rest, splits)

    def sums_shape(self, x_TD: jax.Array) -> jax.ShapeDtypeStruct:
        """Of h; what is in no tile's list is left unwritten."""
        # Sums that are complete are rounded as the expand would round them.
        dtype = x_TD.dtype if self.splits == 1 else jnp.float32
        rows = self.splits * x_TD.shape[0]
        return jax.ShapeDtypeStruct((rows, len(self.pages) * self.list_ranks), dtype)

    def launch(self, layer, x_TD, tables, pools: Sequence[LoraPool]) -> jax.Array:
        """The shrink as a kernel of its own."""

        def body(*refs):
            self.run([pl.program_id(axis) for axis in range(3)], *refs)

        return pl.pallas_call(
            body,
            out_shape=self.sums_shape(x_TD),
            grid=self.grid,
            compiler_params=plgpu.CompilerParams(
                num_warps=self.cut.warps, num_stages=self.cut.stages
            ),
            name="lora_shrink",
        )(layer, x_TD, tables, *operands(pools))

    def run(self, place, layer, x_TD, tables, a_refs, scale_refs, h_UC) -> None:
        """What the program at a place of the grid does, given references."""
        part_block, split, first_m = place
        part = jax.lax.div(part_block, self.cut.rank_programs)
        first_block = jax.lax.rem(part_block, self.cut.rank_programs)
        of_parts = zip(tables, a_refs, scale_refs, strict=True)
        for i, (table_MX, a_RD, scale_LS) in enumerate(of_parts):
            multiply = functools.partial(
                self._multiply_tile,
                i,
                split,
                first_block,
                layer=layer,
                x_TD=x_TD,
                table_MX=table_MX,
                a_RD=a_RD,
                scale_LS=scale_LS,
                h_UC=h_UC,
            )
            block = dict(block=first_block, block_ranks=self.cut.block_ranks)

            @pl.when(part == i)
            def _(multiply=multiply, table_MX=table_MX, block=block):
                for_each_tile(multiply, table_MX, first_m, self.row_programs, **block)

    def _multiply_tile(
        self, i, split, first_block, of: TileRow, m, *, layer, x_TD, table_MX, a_RD, scale_LS, h_UC
    ) -> None:
        """Some blocks of the ranks of row tile m in part i."""
        cut, T = self.cut, x_TD.shape[0]
        row_t, in_tile_t = rows_of(of, block_rows=self.block_rows)
        plus_scale, minus_scale = scale_LS[layer[...], of.plus], scale_LS[layer[...], of.minus]

        def multiply_ranks(n, page_r):
            k = first_block + n * cut.rank_programs
            next_k = k + cut.rank_programs
            next_page_r = page_ids(table_MX, m, next_k, block_ranks=cut.block_ranks)
            rank_r, in_list_r = ranks_of(of, k, block_ranks=cut.block_ranks)
            row_r = pool_rows(page_r, rank_r, layer=layer, pages=self.pages[i])
            h_tr = _dot_over_inputs(
                x_TD,
                a_RD,
                (row_t[:, None], row_r[:, None]),
                (in_tile_t[:, None], in_list_r[:, None]),
                first_step=split * self.split_steps,
                steps=self.split_steps,
                block_k=cut.block_k,
            )
            of_plus_r = rank_r < of.plus_pages * PAGE_RANKS
            h_tr *= jnp.where(of_plus_r, plus_scale, -minus_scale)[None, :]
            at_t = split * T + row_t
            at_r = i * self.list_ranks + of.place * PAGE_RANKS + rank_r
            h_at = h_UC.at[at_t[:, None], at_r[None, :]]
            plgpu.store(h_at, h_tr.astype(h_UC.dtype), mask=in_tile_t[:, None])
            return next_page_r

        blocks = pl.cdiv(of.pages * PAGE_RANKS, cut.block_ranks)
        steps = pl.cdiv(blocks - first_block, cut.rank_programs)
        jax.lax.fori_loop(0, steps, multiply_ranks, of.page_r)


def operands(pools: Sequence[LoraPool]) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """What the programs read of pools."""
    return tuple(p.a_RD for p in pools), tuple(p.scale_LS for p in pools)


def _dot_over_inputs(x_TD, a_RD, rows, masks, *, first_step, steps: int, block_k: int) -> jax.Array:
    """`x @ A^T` over some steps of the input columns, `[t, r]` float32; rows and masks of both."""
    D = x_TD.shape[1]

    def load(ref, row, mask, at_d):
        if D % (steps * block_k):  # the last split has steps of less, or of nothing
            mask = mask & (at_d < D)[None, :]
        return plgpu.load(ref.at[row, at_d[None, :]], mask=mask, other=0)

    def step(n, h_tr):
        at_d = (first_step + n) * block_k + jnp.arange(block_k)
        x_td = load(x_TD, rows[0], masks[0], at_d)
        a_rd = load(a_RD, rows[1], masks[1], at_d)
        return h_tr + dot(x_td, a_rd.astype(x_td.dtype), contract=(1, 1))

    zeros_tr = jnp.zeros((rows[0].shape[0], rows[1].shape[0]), jnp.float32)
    return jax.lax.fori_loop(0, steps, step, zeros_tr)
