"""A base product and the LoRA updates of all its parts in one launch, for few rows of input.

    y_TE = x_TD @ w_DE + bias_E;  y_TE[t] += (scale * x_TD[t] @ A_RD[ranks]^T) @ B_RE[ranks]

In a decode, launches cost more than what most adapters add. The first programs of the launch are
the shrink's: they write their sums, h, to memory and count themselves as arrived. Each of the
others has some columns for all rows, streams its columns of w, waits for the shrink, which has long
ended then, and adds the columns of B, in blocks of ranks that short lists share (`triton_lists`).
No program waits for a later one, and a GPU starts them in order, so that they cannot wait for each
other in a circle. Both products accumulate in float32, in a fixed order, and are rounded once
together. Where there are few columns, other programs stream the rest of the input columns before
them, and leave their sums to them in memory.

U splits * T rows of partial sums, C rank columns of all parts; other letters as in `api`, `layout`
and `triton_lists`. Lower case is one block: t rows (all of them), d input columns, r ranks, e
output columns; u is one split.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lora_matmul import triton_shrink
from pallas_kernels.lora_matmul.column_segments import ColumnSegment, column_segments
from pallas_kernels.lora_matmul.layout import PAGE_RANKS, LoraPool, RowTiles
from pallas_kernels.lora_matmul.rank_tables import pool_rows
from pallas_kernels.lora_matmul.tiles import block_height
from pallas_kernels.lora_matmul.tiles_linear import LinearTile, refusals
from pallas_kernels.lora_matmul.triton import check_rows
from pallas_kernels.lora_matmul.triton_dot import dot
from pallas_kernels.lora_matmul.triton_lists import LIST_FIELDS, ListArrays, rank_lists
from pallas_kernels.lora_matmul.triton_shrink import Shrink


# Under a jit of its own for the reason of `triton.lora_update`.
@functools.partial(jax.jit, static_argnames=("columns", "cut"))
def lora_linear(
    x_TD: jax.Array,
    w_DE: jax.Array,
    bias_E: jax.Array | None,
    pools: tuple[LoraPool, ...],
    tiles: RowTiles,
    layer: jax.Array,
    arrived: jax.Array,
    spare: jax.Array,
    *,
    columns: tuple[int, ...],
    cut: LinearTile,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.lora_linear`, which has checked the shapes; `columns` are the parts' first ones.

    Args:
      arrived: `[1]` int32 zero; counts programs of the shrink.
      spare: `[1]` int32 of any value, what the launch before counted in.

    Returns:
      `[T, E]` sums, then zero and any value: `arrived` and `spare` of the next launch. A launch
      sets the other's counter back, as nobody knows when its own is not read any more.
    """
    T, itemsize = x_TD.shape[0], x_TD.dtype.itemsize
    check_rows(x_TD, tiles, block_rows=cut.tile_rows)
    if faults := refusals(cut, rows=T, itemsize=itemsize):
        raise ValueError(f"{cut} is not legal: " + "; ".join(faults))
    lists = rank_lists(
        pools,
        tiles,
        block_ranks=cut.block_ranks,
        shrink_ranks=cut.shrink.block_ranks,
        rank_programs=cut.shrink.rank_programs,
    )
    shrink = Shrink.of(
        pools,
        list_ranks=lists.ranks,
        block_rows=cut.tile_rows,
        row_programs=min(cut.row_programs, tiles.first_M.shape[0]),
        cut=cut.shrink,
    )
    segments = column_segments(pools, columns, w_DE.shape[1])
    a_of_parts, scales = triton_shrink.operands(pools)
    operands = _Operands(
        layer=layer,
        x_TD=x_TD,
        w_DE=w_DE,
        biases=() if bias_E is None else (bias_E,),
        tables=lists.tables,
        a_of_parts=a_of_parts,
        scales=scales,
        lists=lists.arrays,
        b_of_parts=tuple(pool.b_RE for pool in pools),
    )
    return _Linear(shrink=shrink, segments=segments, cut=cut).launch(operands, arrived, spare)


class _Operands(NamedTuple):
    """What the launch reads; arrays, or references to them in the kernel.

    Attributes:
      layer: scalar.
      x_TD, w_DE, biases: of the base product; one bias or none.
      tables, lists: see `triton_lists.RankLists`.
      a_of_parts, scales, b_of_parts: of the pool of each part.
    """

    layer: Any
    x_TD: Any
    w_DE: Any
    biases: tuple[Any, ...]
    tables: tuple[Any, ...]
    a_of_parts: tuple[Any, ...]
    scales: tuple[Any, ...]
    lists: ListArrays
    b_of_parts: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Linear:
    """How the work is shared among programs, and what each of them does.

    Attributes:
      shrink: the same for the first ones, which make h.
      segments: all columns, of parts and of none.
      cut: the rest.
    """

    shrink: Shrink
    segments: Sequence[ColumnSegment]
    cut: LinearTile

    @property
    def blocks(self) -> int:
        """Of columns; in each range of the input columns, each has a program."""
        return sum(_blocks_of(segment, self.cut.block_columns) for segment in self.segments)

    def launch(self, operands: _Operands, arrived, spare) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns what `lora_linear` does."""
        x_TD = operands.x_TD
        T, E = x_TD.shape[0], operands.w_DE.shape[1]
        first = len(jax.tree.leaves(operands))
        y_TE, spare, arrived, *_ = pl.pallas_call(
            self._run,
            out_shape=(
                jax.ShapeDtypeStruct((T, E), x_TD.dtype),
                *(jax.ShapeDtypeStruct(of.shape, of.dtype) for of in (arrived, spare)),
                self.shrink.sums_shape(x_TD),
                (jax.ShapeDtypeStruct((T, E), jnp.float32),) * (self.cut.splits - 1),
            ),
            grid=(self.shrink.programs + self.blocks * self.cut.splits,),
            compiler_params=plgpu.CompilerParams(
                num_warps=self.cut.warps, num_stages=self.cut.stages
            ),
            input_output_aliases={first: 1, first + 1: 2},
            name="lora_linear",
        )(operands, arrived, spare)
        return y_TE, arrived, spare

    def _run(self, operands: _Operands, _, __, y_TE, arrived, spare, h_UC, given_refs) -> None:
        """What a program does, given references; the counters come as inputs, too."""
        program, first = pl.program_id(0), self.shrink.programs

        @pl.when(program < first)
        def _():
            place, of = self.shrink.place(program), operands
            self.shrink.run(place, of.layer, of.x_TD, of.tables, of.a_of_parts, of.scales, h_UC)
            _arrive(arrived)

        @pl.when(program == 0)
        def _():
            plgpu.store(spare.at[jnp.int32(0)], jnp.int32(0))

        @pl.when(program >= first)
        def _():
            self._multiply(program - first, operands, y_TE, arrived, h_UC, given_refs)

    def _multiply(self, nth, operands: _Operands, y_TE, arrived, h_UC, given_refs) -> None:
        """The product for a block of columns; programs of the first range add all the rest."""
        block = self._block(nth, rows=y_TE.shape[0])
        # Loaded before the product, used after it.
        lists = _Lists.of(block.part, operands.lists, h_UC, block.row_t, cut=self.cut)
        of_first = lists.block_t(0), lists.blocks(0)
        first_te = _begin(operands.biases, block)
        y_te = _product(first_te, operands.x_TD, operands.w_DE, block, cut=self.cut)
        at, mask_te = block.places()

        def give(given_TE):
            plgpu.store(given_TE.at[at], y_te, mask=mask_te)
            _arrive(arrived)

        for i, given_TE in enumerate(given_refs):
            pl.when(block.split == i + 1)(functools.partial(give, given_TE))

        @pl.when(block.split == 0)
        def _():
            _wait_until(arrived, self.shrink.programs + self.blocks * len(given_refs))
            first_k = lists.sums(0), *of_first
            given = [plgpu.load(given_TE.at[at], mask=mask_te, other=0) for given_TE in given_refs]
            sums_te = functools.reduce(jnp.add, given, y_te)
            sums_te = self._add_updates(sums_te, first_k, lists, block, operands)
            plgpu.store(y_TE.at[at], sums_te.astype(y_TE.dtype), mask=mask_te)

    def _block(self, nth, *, rows: int) -> "_Block":
        """What the nth program of the product has."""
        split, block = _share(nth, self.blocks, self.cut.splits)
        part, column, stop = _place(self.segments, block, self.cut.block_columns)
        row_t, at_e = jnp.arange(block_height(rows)), column + jnp.arange(self.cut.block_columns)
        return _Block(part, split, row_t, at_e, is_row_t=row_t < rows, is_column_e=at_e < stop)

    def _add_updates(self, y_te, first_k, lists: "_Lists", block: "_Block", operands: _Operands):
        """Adds `h @ B` of each part; in those whose columns they are not, lists have no pages."""
        dtype = operands.x_TD.dtype
        for i, b_RE in enumerate(operands.b_of_parts):
            first = next(s.start for s in self.segments if s.part == i)
            at_layer = dict(layer=operands.layer, pages=self.shrink.pages[i], dtype=dtype)
            at_e = block.at_e - first
            b_re = functools.partial(_load_b, b_RE, at_e, block.is_column_e, **at_layer)
            mine = lists._replace(pages_t=jnp.where(block.part == i, lists.pages_t, 0))
            y_te = _add_part(y_te, first_k, mine, b_re, dtype=dtype)
        return y_te


class _Block(NamedTuple):
    """The rows and columns of one program of the product.

    Attributes:
      part: whose columns they are, -1 for nobody's.
      split: which range of the input columns is multiplied.
      row_t, at_e: the rows, all of them, and the columns.
      is_row_t, is_column_e: which of them exist.
    """

    part: jax.Array
    split: jax.Array | int
    row_t: jax.Array
    at_e: jax.Array
    is_row_t: jax.Array
    is_column_e: jax.Array

    def places(self):
        """Where the block lies in an array of all, and which of its places exist."""
        at = self.row_t[:, None], self.at_e[None, :]
        return at, self.is_row_t[:, None] & self.is_column_e[None, :]


def _share(nth, blocks: int, splits: int):
    """Range of the input columns and block of columns of one of the programs for the product.

    Those of the first range wait for the others, and so come last.
    """
    if splits == 1:
        return 0, nth
    return splits - 1 - jax.lax.div(nth, blocks), jax.lax.rem(nth, blocks)


def _arrive(arrived) -> None:
    """Counts the program as one that has written what others wait for."""
    plgpu.debug_barrier()  # one thread counts for all, after all have written
    plgpu.atomic_add(arrived, (jnp.int32(0),), jnp.int32(1))


def _wait_until(arrived, programs: int) -> None:
    """Waits until so many have arrived; what they wrote can be read then."""
    zero = jnp.int32(0)  # made here, as interpreted loops take no constants

    def count(_):
        return plgpu.atomic_add(arrived, (zero,), zero)

    jax.lax.while_loop(lambda so_far: so_far < programs, count, count(None))


def _load_b(b_RE, at_e, is_column_e, page_r, rank_r, *, layer, pages: int, dtype) -> jax.Array:
    """`[r, e]` of a part's B, given the page and the place of each rank."""
    row_r = pool_rows(page_r, rank_r, layer=layer, pages=pages)
    b_at = b_RE.at[row_r[:, None], at_e[None, :]]
    return plgpu.load(b_at, mask=is_column_e[None, :], other=0).astype(dtype)


def _add_part(y_te, first_k, lists: "_Lists", b_re, *, dtype) -> jax.Array:
    """Adds `h @ B` of one part.

    Args:
      y_te: what it is added to.
      first_k: `sums`, `block_t` and `blocks` of the lists' first ones.
      lists: the part's.
      b_re: loads a block of B, given its page and place of each rank.
      dtype: of the operands.
    """
    rank_r = jnp.arange(lists.block_ranks)

    def multiply_ranks(k, carry):
        y_te, h_utr, block_t, blocks = carry
        following = lists.sums(k + 1), lists.block_t(k + 1), lists.blocks(k + 1)
        h_tr = functools.reduce(jnp.add, h_utr).astype(dtype)

        def add_block(n, y_te):
            h_of_block_tr = jnp.where((block_t == n)[:, None], h_tr, 0)
            return y_te + dot(h_of_block_tr, b_re(lists.pages(k, n), rank_r), contract=(1, 0))

        return jax.lax.fori_loop(0, blocks, add_block, y_te), *following

    steps = pl.cdiv(jnp.max(lists.pages_t) * PAGE_RANKS, lists.block_ranks)
    return jax.lax.fori_loop(0, steps, multiply_ranks, (y_te, *first_k))[0]


def _place(segments: Sequence[ColumnSegment], program, block_columns: int):
    """A program's part, its first column, and where its segment ends."""
    first = 0
    part, column, stop = (jnp.int32(0) for _ in range(3))
    for s in segments:
        here = program >= first
        part = jnp.where(here, s.part, part)
        column = jnp.where(here, s.start + (program - first) * block_columns, column)
        stop = jnp.where(here, s.stop, stop)
        first += _blocks_of(s, block_columns)
    return part, column, stop


def _blocks_of(segment: ColumnSegment, block_columns: int) -> int:
    return pl.cdiv(segment.stop - segment.start, block_columns)


class _Lists(NamedTuple):
    """The rank lists of one part, in a kernel.

    Attributes:
      at_t: each row's list: where the arrays have it, in the part; anything for none.
      has_t: whether there is one.
      pages_t: how many pages it has.
      place_t: where in its first block it begins, in pages.
      row_t: the rows.
      refs, h_UC: references.
      first_n: the part's first of `refs.blocks_N`.
      first_c: the part's first column of `h_UC`.
      rows: T.
      block_ranks: of a block.
    """

    at_t: jax.Array
    has_t: jax.Array
    pages_t: jax.Array
    place_t: jax.Array
    row_t: jax.Array
    refs: ListArrays
    h_UC: Any
    first_n: jax.Array
    first_c: jax.Array
    rows: int
    block_ranks: int

    @classmethod
    def of(cls, part, refs: ListArrays, h_UC, row_t, *, cut: LinearTile) -> "_Lists":
        rows, part = refs.list_T.shape[0], jnp.maximum(part, 0)
        parts = refs.list_MF.shape[0] // rows
        list_t = plgpu.load(refs.list_T.at[row_t], mask=row_t < rows, other=-1)
        at_t, has_t = part * rows + list_t, list_t >= 0
        return cls(
            at_t=at_t,
            has_t=has_t,
            pages_t=plgpu.load(refs.list_MF.at[at_t, 0], mask=has_t, other=0),
            place_t=plgpu.load(refs.list_MF.at[at_t, 1], mask=has_t, other=0),
            row_t=row_t,
            refs=refs,
            h_UC=h_UC,
            first_n=part * (refs.blocks_N.shape[0] // parts),
            first_c=part * (h_UC.shape[1] // parts),
            rows=rows,
            block_ranks=cut.block_ranks,
        )

    def block_t(self, k) -> jax.Array:
        """Which block the k-th of each row's list is in, -1 for none."""
        at_t = self.refs.list_MF.at[self.at_t, LIST_FIELDS + k]
        return plgpu.load(at_t, mask=self.has_t, other=-1)

    def blocks(self, k) -> jax.Array:
        """How many blocks the lists' k-th ones are in."""
        return self.refs.blocks_N[self.first_n + k]

    def pages(self, k, n) -> jax.Array:
        """Page of each rank of the n-th block of these; page 0 where no list is."""
        at_r = jax.lax.div(jnp.arange(self.block_ranks), PAGE_RANKS)
        return plgpu.load(self.refs.page_MQ.at[(self.first_n + k) * self.rows + n, at_r])

    def sums(self, k) -> tuple[jax.Array, ...]:
        """Each split's sums of the k-th block of each row's list, `[t, r]`; zeros beside it."""
        rank_r = k * self.block_ranks + jnp.arange(self.block_ranks)
        begin_t = self.place_t * PAGE_RANKS
        end_t = begin_t + self.pages_t * PAGE_RANKS
        at_r = self.first_c + rank_r
        mask_tr = (rank_r >= begin_t[:, None]) & (rank_r < end_t[:, None])
        return tuple(  # unrolled, so that all loads are in flight
            plgpu.load(
                self.h_UC.at[(u * self.rows + self.row_t)[:, None], at_r[None, :]],
                mask=mask_tr,
                other=0,
            )
            for u in range(self.h_UC.shape[0] // self.rows)
        )


def _begin(biases, block: _Block) -> jax.Array:
    """What sums begin with, `[t, e]` float32: the bias, if there is one, in the first range."""
    mask_e = block.is_column_e & (block.split == 0)
    first_te = jnp.zeros((block.row_t.shape[0], block.at_e.shape[0]), jnp.float32)
    for bias_E in biases:
        bias_e = plgpu.load(bias_E.at[block.at_e], mask=mask_e, other=0)
        first_te += bias_e.astype(jnp.float32)[None, :]
    return first_te


def _product(first_te, x_TD, w_DE, block: _Block, *, cut: LinearTile) -> jax.Array:
    """`first + x @ w` over a range of the input columns, `[t, e]` float32."""
    D = x_TD.shape[1]
    steps = pl.cdiv(pl.cdiv(D, cut.block_k), cut.splits)

    def step(n, y_te):
        at_d = (block.split * steps + n) * cut.block_k + jnp.arange(cut.block_k)
        x_mask_td, w_mask_de = block.is_row_t[:, None], block.is_column_e[None, :]
        if cut.splits * steps * cut.block_k > D:  # the last range has less
            x_mask_td, w_mask_de = x_mask_td & (at_d < D)[None, :], w_mask_de & (at_d < D)[:, None]
        x_td = plgpu.load(x_TD.at[block.row_t[:, None], at_d[None, :]], mask=x_mask_td, other=0)
        w_de = plgpu.load(w_DE.at[at_d[:, None], block.at_e[None, :]], mask=w_mask_de, other=0)
        return y_te + dot(x_td, w_de, contract=(1, 0))

    return jax.lax.fori_loop(0, steps, step, first_te)
