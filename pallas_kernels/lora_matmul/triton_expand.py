"""The second half of the LoRA operator for NVIDIA GPUs: `update = h @ B`, of all parts.

    out_TE[t] = (sum over u of h_UC[u * T + t, ranks]) @ B_RE[ranks]

It only writes, so that a base product that comes after it can add it on its way, and it writes all
of it: rows without an adapter and columns of no part get zeros. Letters as in `triton_shrink`; e
output columns are one block.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from pallas_kernels.lora_matmul.column_segments import ColumnSegment
from pallas_kernels.lora_matmul.layout import PAGE_RANKS, LoraPool
from pallas_kernels.lora_matmul.rank_tables import (
    TileRow,
    for_each_tile,
    page_ids,
    pool_rows,
    ranks_of,
    rows_of,
)
from pallas_kernels.lora_matmul.tiles import ExpandTile
from pallas_kernels.lora_matmul.triton_dot import dot


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Expand:
    """How the work is shared among programs, and what each of them does.

    Attributes:
      segments: all columns, of parts and of none.
      pages: of a layer, in the pool of each part.
      rows: T.
      block_rows: of a block; no fewer than of a row tile.
      row_programs: along the rows; each does every so many-th row tile.
      dtype: in which h and B are multiplied.
      cut: the rest.
    """

    segments: tuple[ColumnSegment, ...]
    pages: tuple[int, ...]
    rows: int
    block_rows: int
    row_programs: int
    dtype: DTypeLike
    cut: ExpandTile

    def launch(
        self, layer, tables, h_UC, pools: Sequence[LoraPool], *, dtype: DTypeLike
    ) -> jax.Array:
        """Returns `[T, E]` in `dtype`."""
        columns = sum(self._programs(segment) for segment in self.segments)
        return pl.pallas_call(
            self._run,
            out_shape=jax.ShapeDtypeStruct((self.rows, self.segments[-1].stop), dtype),
            grid=(columns, self.row_programs),
            compiler_params=plgpu.CompilerParams(
                num_warps=self.cut.warps, num_stages=self.cut.stages
            ),
            name="lora_expand",
        )(layer, tables, h_UC, tuple(pool.b_RE for pool in pools))

    def _programs(self, segment: ColumnSegment) -> int:
        """Along its columns."""
        return pl.cdiv(segment.stop - segment.start, self.cut.block_columns * self.cut.blocks)

    def _run(self, layer, tables, h_UC, b_refs, out_TE) -> None:
        any_program, first_m = (pl.program_id(axis) for axis in range(2))
        first = 0
        for segment in self.segments:
            program, programs = any_program - first, self._programs(segment)
            first += programs
            part = max(segment.part, 0)  # which tiles there are is the same in all parts
            write = functools.partial(
                self._write_tile,
                segment,
                program * self.cut.blocks,
                layer=layer,
                table_MX=tables[part],
                h_UC=h_UC,
                b_RE=b_refs[part],
                out_TE=out_TE,
            )

            @pl.when((program >= 0) & (program < programs))
            def _(write=write, table_MX=tables[part]):
                block = dict(block=0, block_ranks=self.cut.block_ranks)
                for_each_tile(write, table_MX, first_m, self.row_programs, **block, idle=True)

    def _write_tile(
        self,
        segment: ColumnSegment,
        first_block,
        of: TileRow,
        m,
        *,
        layer,
        table_MX,
        h_UC,
        b_RE,
        out_TE,
    ) -> None:
        """Some blocks of columns of row tile m."""
        block = _Tile(
            of=of,
            m=m,
            segment=segment,
            first_block=first_block,
            layer=layer,
            table_MX=table_MX,
            h_UC=h_UC,
            b_RE=b_RE,
            out_TE=out_TE,
            expand=self,
        )
        if segment.part < 0:
            block.write_zeros()
            return
        pl.when(of.pages == 0)(block.write_zeros)
        with_ranks = of.pages > 0
        # Most tiles of a decode have one row, for which a block of rows would take as many
        # instructions as for all of them. Tall blocks leave out what they would trace in vain.
        if self.block_rows < 64:
            pl.when(with_ranks & (of.rows == 1))(block.write_row)
            with_ranks &= of.rows != 1
        # Most adapters have ranks for one block, and mixtures for two.
        blocks = pl.cdiv(of.pages * PAGE_RANKS, self.cut.block_ranks)
        pl.when(with_ranks & (blocks == 1))(block.write_held)
        pl.when(with_ranks & (blocks == 2))(block.write_two_held)
        pl.when(with_ranks & (blocks > 2))(block.write_in_steps)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Tile:
    """A row tile, and what a program needs to write some blocks of its columns.

    Attributes:
      of, m: the row tile, and which it is.
      segment, first_block: the columns.
      layer, table_MX, h_UC, b_RE, out_TE: references.
      expand: the cut.
    """

    of: TileRow
    m: jax.Array
    segment: ColumnSegment
    first_block: jax.Array
    layer: Any
    table_MX: Any
    h_UC: Any
    b_RE: Any
    out_TE: Any
    expand: Expand

    def write_zeros(self) -> None:
        rows, is_row = self._rows()
        cut = self.expand.cut
        zeros_te = jnp.zeros((self.expand.block_rows, cut.block_columns), self.out_TE.dtype)
        jax.lax.fori_loop(0, cut.blocks, lambda n, _: self._store(rows, is_row, n, zeros_te), None)

    def write_held(self) -> None:
        """All ranks at once, which are read once for all columns."""
        rows, is_row = self._rows()
        h_tr, b_at, is_rank_r = self._h(rows, is_row, 0), *self._ranks(0)

        def write(n, _):
            sums = dot(h_tr, self._b(b_at, is_rank_r, n), contract=(1, 0))
            self._store(rows, is_row, n, sums)

        jax.lax.fori_loop(0, self.expand.cut.blocks, write, None)

    def write_two_held(self) -> None:
        """Two blocks of the ranks, whose sums and addresses are read once for all columns."""
        rows, is_row = self._rows()
        both = [(self._h(rows, is_row, k), *self._ranks(k)) for k in range(2)]

        def write(n, _):
            first, second = (
                dot(h_tr, self._b(b_at, is_rank_r, n), contract=(1, 0))
                for h_tr, b_at, is_rank_r in both
            )
            self._store(rows, is_row, n, first + second)

        jax.lax.fori_loop(0, self.expand.cut.blocks, write, None)

    def write_in_steps(self) -> None:
        """Block by block of the ranks.

        A loop that Triton does not take apart: sums of several splits, in flight for several steps,
        would take the memory of the programs beside this one, which have other ways to go.
        """
        rows, is_row = self._rows()
        steps = pl.cdiv(self.of.pages * PAGE_RANKS, self.expand.cut.block_ranks)

        def step(state):
            i, sums = state
            n, k = jax.lax.div(i, steps), jax.lax.rem(i, steps)
            h_tr, b_at, is_rank_r = self._h(rows, is_row, k), *self._ranks(k)
            product = dot(h_tr, self._b(b_at, is_rank_r, n), contract=(1, 0))
            sums = jnp.where(k == 0, 0, sums) + product
            self._store(rows, is_row & (k == steps - 1), n, sums)
            return i + 1, sums

        end = self.expand.cut.blocks * steps
        zeros = jnp.zeros((self.expand.block_rows, self.expand.cut.block_columns), jnp.float32)
        jax.lax.while_loop(lambda state: state[0] < end, step, (jnp.int32(0), zeros))

    def write_row(self) -> None:
        """A tile of one row, without the matmul unit."""
        cut = self.expand.cut
        steps = pl.cdiv(self.of.pages * PAGE_RANKS, cut.block_ranks)

        def write(n, _):
            def step(k, sums):
                b_at, is_rank_r = self._ranks(k)
                h_r = self._h(self.of.first, True, k).astype(jnp.float32)
                b_re = self._b(b_at, is_rank_r, n).astype(jnp.float32)
                return sums + jnp.sum(h_r[:, None] * b_re, axis=0)

            zeros_e = jnp.zeros(cut.block_columns, jnp.float32)
            sums = jax.lax.fori_loop(0, steps, step, zeros_e)
            self._store(self.of.first, True, n, sums)

        jax.lax.fori_loop(0, cut.blocks, write, None)

    def _rows(self):
        row_t, in_tile_t = rows_of(self.of, block_rows=self.expand.block_rows)
        return row_t[:, None], in_tile_t[:, None]

    def _ranks(self, k):
        """Of block k of the list: where they lie in B, and which of them exist."""
        block_ranks = self.expand.cut.block_ranks
        page_r = page_ids(self.table_MX, self.m, k, block_ranks=block_ranks)
        rank_r, in_list_r = ranks_of(self.of, k, block_ranks=block_ranks)
        pages = self.expand.pages[self.segment.part]
        return pool_rows(page_r, rank_r, layer=self.layer, pages=pages), in_list_r

    def _h(self, row, is_row, k) -> jax.Array:
        """Sums of block k of the list, `[t, r]`, or `[r]` of one row, a scalar; split by split."""
        rank_r, in_list_r = ranks_of(self.of, k, block_ranks=self.expand.cut.block_ranks)
        list_ranks = self.h_UC.shape[1] // len(self.expand.pages)
        at_r, mask = self.segment.part * list_ranks + rank_r, in_list_r
        if not isinstance(is_row, bool):
            at_r, mask = at_r[None, :], is_row & in_list_r[None, :]
        h_u = [  # unrolled, so that all loads are in flight
            plgpu.load(self.h_UC.at[u * self.expand.rows + row, at_r], mask=mask, other=0)
            for u in range(self.h_UC.shape[0] // self.expand.rows)
        ]
        return functools.reduce(jnp.add, h_u).astype(self.expand.dtype)

    def _b(self, at_r, is_rank_r, n) -> jax.Array:
        at_e, in_part_e = self._columns(n)
        mask_re = is_rank_r[:, None] & in_part_e[None, :]
        b_re = plgpu.load(self.b_RE.at[at_r[:, None], at_e[None, :]], mask=mask_re, other=0)
        return b_re.astype(self.expand.dtype)

    def _store(self, row, is_row, n, sums) -> None:
        at_e, mask = self._columns(n)
        at_e += self.segment.start
        if not isinstance(is_row, bool):
            at_e, mask = at_e[None, :], is_row & mask[None, :]
        plgpu.store(self.out_TE.at[row, at_e], sums.astype(self.out_TE.dtype), mask=mask)

    def _columns(self, n):
        """Of block n of the program: which of the segment's, and which of them exist."""
        at_e = (self.first_block + n) * self.expand.cut.block_columns
        at_e += jnp.arange(self.expand.cut.block_columns)
        return at_e, at_e < self.segment.stop - self.segment.start
