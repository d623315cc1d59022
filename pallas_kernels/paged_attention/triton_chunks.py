"""Attention of prompt chunks in Triton: one launch writes keys and values, one attends.

A program attends a block of one chunk's tokens, all query heads of a key-value head folded into its
rows. Keys are read from pages only, those of the step included. The blocks are listed once a step.

C chunks, B blocks, R rows of a block, H head width; other letters in `triton_rows`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paged_attention.layout import Chunks
from pallas_kernels.paged_attention.tiles import ChunkTile
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

WRITE_TOKENS = 32  # a program's tokens in the write: 8 KB at 128 bfloat16


class _Blocks(NamedTuple):
    """Which tokens each program attends, all `[B]` int32.

    Attributes:
      first_B: first flat token.
      tokens_B: how many; 0 for programs without work.
      position_B: position of the first token in its request; `-tokens` for padding, which then sees
        no keys and comes out as zeros.
      chunk_B: row of the page tables.
    """

    first_B: jax.Array
    tokens_B: jax.Array
    position_B: jax.Array
    chunk_B: jax.Array


def write_kv(
    tokens: tuple[jax.Array, jax.Array, jax.Array],
    k_RH: jax.Array,
    v_RH: jax.Array,
    *,
    page_T: jax.Array,
    offset_T: jax.Array,
    layer_page: jax.Array,
    heads: Heads,
) -> tuple[jax.Array, jax.Array]:
    """Rotates every token's keys and writes them, and its values, to the cache in place."""
    inputs = (layer_page, page_T, offset_T, *tokens, k_RH, v_RH)
    caches = len(inputs) - 2, len(inputs) - 1
    return pl.pallas_call(
        functools.partial(_write, heads=heads),
        grid=(heads.kv, pl.cdiv(page_T.shape[0], WRITE_TOKENS)),
        in_specs=[whole] * len(inputs),
        out_specs=[whole] * 2,
        out_shape=[jax.ShapeDtypeStruct(c.shape, c.dtype) for c in (k_RH, v_RH)],
        input_output_aliases={caches[0]: 0, caches[1]: 1},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        name="write_kv",
    )(*inputs)


def attend(
    tokens: tuple[jax.Array, jax.Array, jax.Array],
    k_RH: jax.Array,
    v_RH: jax.Array,
    *,
    out_RH: jax.Array,
    chunks: Chunks,
    decodes: jax.Array,
    layer_page: jax.Array,
    heads: Heads,
    tile: ChunkTile,
) -> jax.Array:
    """Fills the rows of chunks and padding of `out_RH`, `[T * N, H]`, in place.

    `decodes` is the number of tokens before the first chunk, a scalar.
    """
    blocks = _list_blocks(
        chunks,
        tokens=out_RH.shape[0] // heads.query,
        decodes=decodes,
        block_tokens=tile.rows // heads.group,  # as many as their query heads fit a block's rows
    )
    inputs = (layer_page, chunks.page_CW, *blocks, *tokens, k_RH, v_RH, out_RH)
    return pl.pallas_call(
        functools.partial(_attend, heads=heads, tile=tile),
        grid=(heads.kv, blocks.first_B.shape[0]),
        in_specs=[whole] * len(inputs),
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct(out_RH.shape, out_RH.dtype),
        input_output_aliases={len(inputs) - 1: 0},
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        name="paged_prefill",
    )(*inputs)


def _list_blocks(chunks: Chunks, *, tokens: int, decodes: jax.Array, block_tokens: int) -> _Blocks:
    """Cuts the chunks, and the padding behind them, into blocks of at most `block_tokens`."""
    C = chunks.len_C.shape[0]
    len_C = jnp.where(jnp.arange(C) < chunks.count, chunks.len_C, 0)
    padding = decodes + len_C.sum()  # chunks follow the decodes and each other without gaps
    first_C = jnp.append(chunks.start_C, padding)
    len_C = jnp.append(len_C, tokens - padding)
    position_C = jnp.append(chunks.kv_len_C, 0) - len_C
    blocks_C = -(-len_C // block_tokens)
    end_C = jnp.cumsum(blocks_C)
    block_B = jnp.arange(-(-tokens // block_tokens) + C)
    chunk_B = jnp.sum(block_B[:, None] >= end_C, axis=1)
    used_B, chunk_B = chunk_B <= C, jnp.minimum(chunk_B, C)
    offset_B = (block_B - (end_C - blocks_C)[chunk_B]) * block_tokens
    left_B = jnp.clip(len_C[chunk_B] - offset_B, 0, block_tokens)
    is_padding_B = chunk_B == C
    tokens_B = jnp.where(used_B, left_B, 0)
    return _Blocks(
        first_B=first_C[chunk_B] + offset_B,
        tokens_B=tokens_B,
        position_B=jnp.where(is_padding_B, -tokens_B, position_C[chunk_B] + offset_B),
        chunk_B=chunk_B,
    )


def _write(
    layer_page,
    page_T,
    offset_T,
    qkv_RH,
    cos_Th,
    sin_Th,
    k_RH,
    v_RH,
    k_out_RH,
    v_out_RH,
    *,
    heads: Heads,
):
    del k_RH, v_RH  # the outputs, under other names
    head = pl.program_id(0)
    token_R = pl.program_id(1) * WRITE_TOKENS + jnp.arange(WRITE_TOKENS)
    inside_R = token_R < page_T.shape[0]
    # Tokens past the end would write to page 0, as padding does.
    page_R, offset_R = (
        plgpu.load(ref.at[token_R], mask=inside_R, other=0) for ref in (page_T, offset_T)
    )
    row_R = ((layer_page[0] + page_R) * heads.kv + head) * heads.page_tokens + offset_R
    i_RH = jax.lax.broadcasted_iota(jnp.int32, (WRITE_TOKENS, heads.width), 1)
    inside_RH = jnp.broadcast_to(inside_R[:, None], i_RH.shape)
    k_row_R1 = (token_R * heads.a_token + heads.query + head)[:, None]
    k_RH = Tokens(qkv_RH, cos_Th, sin_Th).rotated(k_row_R1, token_R[:, None], inside_RH)
    v_RH = plgpu.load(qkv_RH.at[k_row_R1 + heads.kv, i_RH], mask=inside_RH, other=0.0)
    for out_ref, value_RH in ((k_out_RH, k_RH), (v_out_RH, v_RH)):
        target = out_ref.at[row_R[:, None], i_RH]
        plgpu.store(target, value_RH.astype(out_ref.dtype), mask=inside_RH)


def _attend(
    layer_page,
    page_CW,
    first_B,
    tokens_B,
    position_B,
    chunk_B,
    qkv_RH,
    cos_Th,
    sin_Th,
    k_RH,
    v_RH,
    _,
    out_RH,
    *,
    heads: Heads,
    tile: ChunkTile,
):
    head = pl.program_id(0)
    block = pl.num_programs(1) - 1 - pl.program_id(1)  # late blocks see most keys: they start first
    tokens = tokens_B[block]

    @pl.when(tokens > 0)
    def _():
        pages = Pages(k_RH, v_RH, page_CW, chunk_B[block], layer_page[0], head, heads)
        row_R = jnp.arange(tile.rows)
        token_R = jax.lax.div(row_R, heads.group)
        head_R = head * heads.group + row_R - token_R * heads.group
        inside_RH = jnp.broadcast_to((token_R < tokens)[:, None], (tile.rows, heads.width))
        flat_R = first_B[block] + token_R
        q_row_R1 = (flat_R * heads.a_token + head_R)[:, None]
        q_RH = Tokens(qkv_RH, cos_Th, sin_Th).rotated(q_row_R1, flat_R[:, None], inside_RH)
        softmax = _attend_pages(q_RH, pages, position_B[block], token_R, tokens, tile)
        i_RH = jax.lax.broadcasted_iota(jnp.int32, inside_RH.shape, 1)
        target = out_RH.at[(flat_R * heads.query + head_R)[:, None], i_RH]
        plgpu.store(target, softmax.result().astype(out_RH.dtype), mask=inside_RH)


def _attend_pages(q_RH, pages: Pages, position, token_R, tokens, tile: ChunkTile) -> Softmax:
    """Attends rows at `position + token_R` to everything up to themselves."""
    end = position + tokens

    def add(start, page, softmax, *, masked: bool):
        end_or_none = end if masked else None
        k_SH, v_SH = pages.load(page, start, tile.step_tokens, q_RH.dtype, end=end_or_none)
        scores_RS = dot(q_RH, k_SH, trans_b=True) * pages.heads.score_scale
        if masked:
            key_RS = start + jax.lax.broadcasted_iota(jnp.int32, scores_RS.shape, 1)
            seen_RS = key_RS <= (position + token_R)[:, None]
            scores_RS = jnp.where(seen_RS, scores_RS, MASKED)
        return softmax.add(scores_RS, v_SH)

    # Steps that every row sees whole need no masks: all but those of the block's own positions.
    open_steps = jnp.maximum(jax.lax.div(position + 1, tile.step_tokens), 0)
    steps = jax.lax.div(end + tile.step_tokens - 1, tile.step_tokens)
    softmax = Softmax.empty(tile.rows, pages.heads.width)
    for first, last, masked in ((0, open_steps, False), (open_steps, steps, True)):
        add_step = functools.partial(add, masked=masked)
        softmax = over_steps(first, last, tile.step_tokens, pages, add_step, softmax)
    return softmax
