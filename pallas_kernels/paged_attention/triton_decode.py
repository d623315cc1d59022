"""Decode attention in Triton: rotary, the write of the new key and value, and attention in one.

One program reads one split of one row's keys, for one key-value head. The row's new token never
comes from memory: it opens the running softmax of split 0, whose program also stores it, and the
loop reads only what was there before the step. So nothing races.

D decode rows, R query heads of a key-value head padded to 16 or more, H head width; other letters
in `triton_rows`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paged_attention.tiles import DecodeTile
from pallas_kernels.paged_attention.triton_rows import (
    MASKED,
    Heads,
    Pages,
    Softmax,
    Tokens,
    dot,
    over_steps,
    whole,
)

MIN_ROWS = 16  # what a matrix instruction takes; without one, Triton does not pipeline the loop


def attend(
    tokens: tuple[jax.Array, jax.Array, jax.Array],
    k_RH: jax.Array,
    v_RH: jax.Array,
    *,
    kv_len_D: jax.Array,
    page_DW: jax.Array,
    layer_page: jax.Array,
    heads: Heads,
    tile: DecodeTile,
    out_tokens: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `[out_tokens * N, H]`, of which the first D tokens are written, and the cache.

    Args:
      tokens: arrays of `triton_rows.Tokens`.
      k_RH: the cache of keys, as rows; updated in place.
      v_RH: the same for values.
      kv_len_D: `[D]`; rows with 0 come out as zeros and write nothing.
      page_DW: `[D, W]` page ids, within a layer.
      layer_page: `[1]` page of the layer's page 0.
      heads: widths and counts.
      tile: how to divide the work.
      out_tokens: tokens of the output, at least D.
    """
    D, dtype = kv_len_D.shape[0], tokens[0].dtype
    out_rows = (out_tokens if tile.splits == 1 else tile.splits * D) * heads.query
    outs = [jax.ShapeDtypeStruct((out_rows, heads.width), dtype)]
    if tile.splits > 1:
        stats = jax.ShapeDtypeStruct((out_rows,), jnp.float32)
        outs = [jax.ShapeDtypeStruct((out_rows, heads.width), jnp.float32), stats, stats]
    inputs = (layer_page, kv_len_D, page_DW, *tokens, k_RH, v_RH)
    caches = len(inputs) - 2, len(inputs) - 1
    k_RH, v_RH, *outs = pl.pallas_call(
        functools.partial(_body, heads=heads, tile=tile),
        grid=(heads.kv, D, tile.splits),
        in_specs=[whole] * len(inputs),
        out_specs=[whole] * (2 + len(outs)),
        out_shape=[jax.ShapeDtypeStruct(c.shape, c.dtype) for c in (k_RH, v_RH)] + outs,
        input_output_aliases={caches[0]: 0, caches[1]: 1},
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        name="paged_decode",
    )(*inputs)
    if tile.splits == 1:
        return outs[0], k_RH, v_RH
    merged_RH = _merge(*outs, splits=tile.splits).astype(dtype)
    return jnp.pad(merged_RH, ((0, out_tokens * heads.query - len(merged_RH)), (0, 0))), k_RH, v_RH


def _merge(out_RH, top_R, total_R, *, splits: int) -> jax.Array:
    """Joins the splits; written out, so that XLA makes one loop of it and no reductions."""
    outs, tops, totals = (jnp.split(x, splits) for x in (out_RH, top_R, total_R))
    top_R = functools.reduce(jnp.maximum, tops)
    weights = [jnp.exp2(top - top_R) for top in tops]
    total_R = sum(w * t for w, t in zip(weights, totals, strict=True))
    out_RH = sum(w[:, None] * out for w, out in zip(weights, outs, strict=True))
    return out_RH / jnp.maximum(total_R, 1e-30)[:, None]


def _body(
    layer_page,
    kv_len_D,
    page_DW,
    qkv_RH,
    cos_Th,
    sin_Th,
    k_RH,
    v_RH,
    k_out_RH,
    v_out_RH,
    out_RH,
    *stats,
    heads: Heads,
    tile: DecodeTile,
):
    head, d, split = (pl.program_id(axis) for axis in range(3))
    kv_len = kv_len_D[d]
    group = jnp.arange(max(MIN_ROWS, pl.next_power_of_2(heads.group)))
    out_row_R = (split * pl.num_programs(1) + d) * heads.query + head * heads.group + group
    in_group_R = group < heads.group
    output = _Output(out_RH, stats, out_row_R, in_group_R)

    @pl.when(kv_len == 0)
    def _():
        output.store(Softmax.empty(len(group), heads.width))

    @pl.when(kv_len > 0)
    def _():
        tokens = Tokens(qkv_RH, cos_Th, sin_Th)
        pages = Pages(k_RH, v_RH, page_DW, d, layer_page[0], head, heads)
        row = d * heads.a_token
        k_row, v_row = row + heads.query + head, row + heads.query + heads.kv + head
        k_H = tokens.rotated(k_row, d).astype(k_RH.dtype)
        v_H = qkv_RH[v_row, :].astype(v_RH.dtype)

        @pl.when(split == 0)
        def _():
            last = kv_len - 1
            page = page_DW[d, jax.lax.div(last, heads.page_tokens)]
            k_out_RH[pages.row(page, last), :] = k_H
            v_out_RH[pages.row(page, last), :] = v_H

        q_row_R1 = (row + head * heads.group + group)[:, None]
        in_group_RH = jnp.broadcast_to(in_group_R[:, None], (len(group), heads.width))
        q_RH = tokens.rotated(q_row_R1, jnp.full_like(q_row_R1, d), in_group_RH)
        softmax = _opened(q_RH, k_H, v_H, split == 0, heads)
        output.store(_attend_split(softmax, q_RH, pages, kv_len - 1, split, tile))


class _Output(NamedTuple):
    """Where a program's softmax goes: its result or, of one split of several, what `_merge` needs.

    `stats` are references for tops and totals, none where nothing is split; `row_R` the rows of the
    query heads, and `in_group_R` which of them are no padding.
    """

    out_RH: Any
    stats: tuple[Any, ...]
    row_R: jax.Array
    in_group_R: jax.Array

    def store(self, softmax: Softmax) -> None:
        i_RH = jax.lax.broadcasted_iota(jnp.int32, softmax.out_RH.shape, 1)
        mask_RH = jnp.broadcast_to(self.in_group_R[:, None], i_RH.shape)
        value_RH = softmax.out_RH if self.stats else softmax.result()
        out_ref = self.out_RH.at[self.row_R[:, None], i_RH]
        plgpu.store(out_ref, value_RH.astype(self.out_RH.dtype), mask=mask_RH)
        for ref, value_R in zip(self.stats, (softmax.top_R, softmax.total_R), strict=False):
            plgpu.store(ref.at[self.row_R], value_R, mask=self.in_group_R)


def _opened(q_RH, k_H, v_H, owner, heads: Heads) -> Softmax:
    """The softmax after the new token, in the split that owns it; as good as empty in others."""
    k_H, v_H = (x.astype(q_RH.dtype).astype(jnp.float32) for x in (k_H, v_H))
    scores_R = jnp.sum(q_RH.astype(jnp.float32) * k_H[None, :], axis=1) * heads.score_scale
    # In other splits a score of MASKED leaves the value without weight, however few keys follow.
    top_R = jnp.where(owner, scores_R, MASKED)
    return Softmax(top_R, jnp.ones_like(scores_R), jnp.broadcast_to(v_H[None, :], q_RH.shape))


def _attend_split(softmax, q_RH, pages: Pages, kv_len, split, tile: DecodeTile) -> Softmax:
    """Adds the split's share of the first `kv_len` tokens."""
    steps = jax.lax.div(kv_len + tile.step_tokens - 1, tile.step_tokens)
    first, last = (jax.lax.div(steps * (split + i), tile.splits) for i in (0, 1))

    def add(start, page, softmax):
        k_SH, v_SH = pages.load(page, start, tile.step_tokens, q_RH.dtype, end=kv_len)
        scores_RS = dot(q_RH, k_SH, trans_b=True) * pages.heads.score_scale
        position_RS = start + jax.lax.broadcasted_iota(jnp.int32, scores_RS.shape, 1)
        return softmax.add(jnp.where(position_RS < kv_len, scores_RS, MASKED), v_SH)

    return over_steps(first, last, tile.step_tokens, pages, add, softmax)
