"""Paged attention, with its rotary turn and its write: decode rows, and chunks of prompts.

A run attends in one layer of the cache after the other. Places past a request's end hold large
numbers, which must not show. D requests, W pages a request; the rest is `attend`'s.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import floors
from benchmarks.gpu import Program
from pallas_kernels.paged_attention import Chunks, Decodes, KVPages, attend
from pallas_kernels.tuning.shapes import MODELS

LAYERS, PAGE_TOKENS = 8, 64
POISON = 1e4
IDLE_DECODES = 32  # decode rows of a step with chunks, none of them used
# Weights and values are rounded to 8 significant bits before they are multiplied.
RTOL = 2**-5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """`requests` that each compute their last `tokens` of `kv_tokens`; 1 is a decode."""

    model: str
    requests: int
    tokens: int
    kv_tokens: int

    @property
    def name(self) -> str:
        kind = "decode" if self.tokens == 1 else f"chunk{self.tokens}"
        return f"attention/{self.model}/{kind}/b{self.requests}/kv{self.kv_tokens}"

    @property
    def pages(self) -> int:
        """Of one layer, the scratch page included."""
        return 1 + self.requests * self.request_pages

    @property
    def request_pages(self) -> int:
        return math.ceil(self.kv_tokens / PAGE_TOKENS)


def programs(case: Attention) -> Iterator[Program]:
    shape = MODELS[case.model]
    heads = dict(heads=shape.heads, kv_heads=shape.kv_heads, head_width=shape.head_width)
    inputs = functools.cache(functools.partial(_inputs, case))
    for impl in ("triton", "xla"):
        yield Program(
            name=f"{case.name}/{impl}",
            fields=dict(
                model=case.model,
                op="attention",
                shape="decode" if case.tokens == 1 else "chunks",
                batch=case.requests,
                tokens=case.tokens,
                kv_tokens=case.kv_tokens,
                adapters=0,
                rank=0,
                impl=impl,
            ),
            work=floors.attention(
                tokens=case.tokens, kv_tokens=case.kv_tokens, requests=case.requests, **heads
            ),
            run=functools.partial(_run, impl=impl, pages=case.pages),
            carry=functools.partial(_cache, case, shape.kv_heads, shape.head_width),
            inputs=inputs,
            calls=LAYERS,
            error=functools.partial(_error, case, inputs),
        )


def _inputs(case: Attention) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    shape, T = MODELS[case.model], case.requests * case.tokens
    key = jax.random.key(0)
    qkv_TE = jax.random.normal(key, (T, sum(shape.linears["qkv"].columns)), jnp.bfloat16)
    angle_Th = jax.random.uniform(key, (T, shape.head_width // 2), maxval=6.0)
    return qkv_TE, angle_Th, _batch(case)


def _run(kv, qkv_TE, angle_Th, batch, *, impl, pages):
    outs_TNH = []
    for layer in range(LAYERS):
        out_TNH, kv = attend(
            qkv_TE, angle_Th, kv, layer_page=layer * pages, implementation=impl, **batch
        )
        outs_TNH.append(out_TNH)
    return kv, outs_TNH


def _pages_of(case: Attention) -> np.ndarray:
    """Pages of each request, scattered as in a server that has run for long."""
    order = np.random.default_rng(0).permutation(case.pages - 1) + 1
    return order.reshape(case.requests, case.request_pages).astype(np.int32)


def _batch(case: Attention) -> dict[str, Any]:
    page_DW, D = _pages_of(case), case.requests
    position_T = np.tile(np.arange(case.kv_tokens - case.tokens, case.kv_tokens), D)
    request_T = np.repeat(np.arange(D), case.tokens)
    where = dict(
        page_T=jnp.asarray(page_DW[request_T, position_T // PAGE_TOKENS]),
        offset_T=jnp.asarray(position_T % PAGE_TOKENS, jnp.int32),
    )
    kv_len_D = jnp.full(D, case.kv_tokens, jnp.int32)
    if case.tokens == 1:
        decodes = Decodes(kv_len_D=kv_len_D, page_DW=jnp.asarray(page_DW), count=jnp.int32(D))
        return dict(decodes=decodes, chunks=None, **where)
    idle = Decodes(
        kv_len_D=jnp.zeros(IDLE_DECODES, jnp.int32),
        page_DW=jnp.zeros((IDLE_DECODES, case.request_pages), jnp.int32),
        count=jnp.int32(0),
    )
    chunks = Chunks(
        start_C=jnp.arange(D, dtype=jnp.int32) * case.tokens,
        len_C=jnp.full(D, case.tokens, jnp.int32),
        kv_len_C=kv_len_D,
        page_CW=jnp.asarray(page_DW),
        count=jnp.int32(D),
    )
    return dict(decodes=idle, chunks=chunks, **where)


def _cache(case: Attention, kv_heads: int, head_width: int) -> KVPages:
    shape = (LAYERS * case.pages, kv_heads, PAGE_TOKENS, head_width)
    end = case.kv_tokens - (case.request_pages - 1) * PAGE_TOKENS
    last_D = _pages_of(case)[:, -1]
    rows = (np.arange(LAYERS)[:, None] * case.pages + last_D).reshape(-1)
    return KVPages(k_PKpH=_pages(0, rows, shape, end), v_PKpH=_pages(1, rows, shape, end))


@functools.partial(jax.jit, static_argnames=("shape", "end"))
def _pages(seed, rows, shape: tuple[int, ...], end: int) -> jax.Array:
    """Random pages, poisoned past the end of the last one of each request, which is in `rows`."""
    pages_PKpH = jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    return pages_PKpH.at[rows, :, end:].set(POISON)


def _error(case: Attention, inputs, returned) -> float:
    """The first layer's largest error against "xla" in float32."""
    qkv_TE, angle_Th, batch = inputs()
    kv, (got_TNH, *_) = returned
    # Writing again what the run has written changes nothing.
    kv = jax.tree.map(lambda pages: pages[: case.pages].astype(jnp.float32), kv)
    with jax.default_matmul_precision("highest"):
        want_TNH, _ = attend(
            qkv_TE.astype(jnp.float32),
            angle_Th,
            kv,
            layer_page=0,
            implementation="xla",
            **batch,
        )
    allowed_TNH = RTOL * jnp.maximum(abs(want_TNH), want_TNH.std(axis=-1, keepdims=True))
    return float((abs(got_TNH.astype(jnp.float32) - want_TNH) / allowed_TNH).max())
