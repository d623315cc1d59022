"""What the Triton kernels share: rows of heads, rotary on load, steps of keys, running softmax.

Every array is seen as rows of one head: token t of `qkv` owns rows `t * (N + 2 K) + head`, query
heads first; a page of the cache owns `K * p` rows, a head's tokens side by side. So all tiles have
the form `[R, H]` or `[S, H]`.

R query rows, S keys of a loop step, H head width, h = H / 2, N query and K key-value heads,
p tokens a page, W pages a request.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

MASKED = -1e30  # finite, so that a row with every key masked stays finite

whole = pl.BlockSpec()  # kernels index whole arrays themselves

# Triton would round float32 to tf32; other dtypes are not touched by this.
dot = functools.partial(plgpu.dot, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """Head counts and widths that a kernel is compiled for."""

    query: int
    kv: int
    width: int
    page_tokens: int

    @property
    def group(self) -> int:
        return self.query // self.kv

    @property
    def a_token(self) -> int:
        return self.query + 2 * self.kv

    @property
    def score_scale(self) -> float:
        """Of scores that go to exp2."""
        return self.width**-0.5 * math.log2(math.e)


class Tokens(NamedTuple):
    """References of a step's projections, as rows of heads, and of its angles.

    `qkv_RH` holds what is before rotary; `cos_Th` and `sin_Th` are float32.
    """

    qkv_RH: Any
    cos_Th: Any
    sin_Th: Any

    def rotated(self, row, token, mask=None) -> jax.Array:
        """Rows of `qkv_RH` turned by their tokens' angles, in the dtype of `qkv_RH`.

        `row` and `token` are scalars, for `[H]`, or `[R, 1]`, for `[R, H]`; `mask` is as wide.
        """
        H = self.qkv_RH.shape[1]
        i_H = jnp.arange(H)
        if mask is not None:
            i_H = jnp.broadcast_to(i_H, mask.shape)

        def load(ref, index, column):
            other = None if mask is None else 0.0
            return plgpu.load(ref.at[index, column], mask=mask, other=other).astype(jnp.float32)

        # Triton cannot join halves: each component reads its partner, half a head away, itself.
        x, partner = load(self.qkv_RH, row, i_H), load(self.qkv_RH, row, i_H ^ (H // 2))
        cos, sin = (load(ref, token, i_H & (H // 2 - 1)) for ref in (self.cos_Th, self.sin_Th))
        turned = x * cos + jnp.where(i_H < H // 2, -partner, partner) * sin
        return turned.astype(self.qkv_RH.dtype)


class Pages(NamedTuple):
    """References of one request's pages, for one head.

    `k_RH` and `v_RH` are the cache as rows; `page_BW` the page tables, of which row `request` is
    used; `page` the layer's page 0.
    """

    k_RH: Any
    v_RH: Any
    page_BW: Any
    request: jax.Array
    page: jax.Array
    head: jax.Array
    heads: Heads

    def row(self, page, position) -> jax.Array:
        """Row of a position's token, on its page."""
        p, K = self.heads.page_tokens, self.heads.kv
        return ((self.page + page) * K + self.head) * p + (position & (p - 1))

    def ids(self, first: jax.Array, count: int) -> jax.Array:
        """Page ids of `count` tokens from `first`, a multiple of `count`: one, or one a token.

        Those of a step past the request's last are any page's.
        """
        p, W = self.heads.page_tokens, self.page_BW.shape[1]
        position = first if p >= count else first + jnp.arange(count)
        return self.page_BW[self.request, jnp.minimum(jax.lax.div(position, p), W - 1)]

    def load(self, page: jax.Array, first: jax.Array, count: int, dtype, *, end: jax.Array | None):
        """Keys and values `[S, H]` of `count` tokens on the pages `ids` gave.

        Places from `end` on are not read, and come out as zeros.
        """
        row_S1 = self.row(page, first + jnp.arange(count))[:, None]
        i_SH = jax.lax.broadcasted_iota(jnp.int32, (count, self.heads.width), 1)
        mask, other = None, None
        if end is not None:
            mask = (first + jax.lax.broadcasted_iota(jnp.int32, i_SH.shape, 0)) < end
            other = 0.0
        return tuple(
            plgpu.load(ref.at[row_S1, i_SH], mask=mask, other=other).astype(dtype)
            for ref in (self.k_RH, self.v_RH)
        )


def over_steps(first, last, tokens: int, pages: Pages, add, softmax: "Softmax") -> "Softmax":
    """Folds steps `first ... last` of `tokens` keys: `softmax = add(start, page ids, softmax)`.

    The next step's page ids are carried, not loaded where they are used: Triton pipelines loads
    whose address waits for another load only half as deep.
    """

    def body(step, carry):
        page, softmax = carry
        start = step * tokens
        return pages.ids(start + tokens, tokens), add(start, page, softmax)

    carry = pages.ids(first * tokens, tokens), softmax
    return jax.lax.fori_loop(first, last, body, carry)[1]


class Softmax(NamedTuple):
    """Running softmax: the largest score so far, the sum of weights, the weighted values.

    Scores are in units of log 2.
    """

    top_R: jax.Array
    total_R: jax.Array
    out_RH: jax.Array

    @classmethod
    def empty(cls, rows: int, width: int) -> "Softmax":
        return cls(
            jnp.full((rows,), MASKED, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
            jnp.zeros((rows, width), jnp.float32),
        )

    def add(self, scores_RS: jax.Array, v_SH: jax.Array) -> "Softmax":
        top_R = jnp.maximum(self.top_R, jnp.max(scores_RS, axis=1))
        shrink_R = jnp.exp2(self.top_R - top_R)
        weights_RS = jnp.exp2(scores_RS - top_R[:, None])
        return Softmax(
            top_R,
            self.total_R * shrink_R + jnp.sum(weights_RS, axis=1),
            self.out_RH * shrink_R[:, None] + dot(weights_RS.astype(v_SH.dtype), v_SH),
        )

    def result(self) -> jax.Array:
        return self.out_RH / jnp.maximum(self.total_R, 1e-30)[:, None]
