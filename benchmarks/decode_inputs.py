"""The inputs of the engine's compiled step at a model's real size, made on the device.

Weights and adapters are random; a step's batch is filled as the engine fills it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.lora_matmul import PAGE_RANKS, LoraPool
from pallas_kernels.paged_attention import KVPages
from valora_jax.engine import step
from valora_jax.engine.batch import BatchLayout
from valora_jax.engine.buckets import Bucket
from valora_jax.engine.fill import Fields, neutral
from valora_jax.engine.sampler import SamplerState
from valora_jax.lora.heads import ReplacedHeads
from valora_jax.models.build import abstract_model
from valora_jax.models.spec import ModelSpec

PAGE_TOKENS, MAX_REQUESTS = 64, 64
BESIDE_PROMPTS = 32  # decodes that a step with prompts has room for
ADAPTERS, RANK = 32, 64
DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """`requests` that compute their last `tokens` of `kv_tokens`; 1 is a decode.

    `adapters` of the requests bring one each, in turn; 0 is the base model alone.
    """

    requests: int
    tokens: int
    kv_tokens: int
    adapters: int

    @property
    def request_pages(self) -> int:
        return math.ceil(self.kv_tokens / PAGE_TOKENS)

    @property
    def bucket(self) -> Bucket:
        """The engine's shape; one chunk a prompt, where the engine would take several steps."""
        B = self.requests
        if self.tokens == 1:
            return Bucket(tokens=B, decodes=B, chunks=0, rows=B)
        rows = BESIDE_PROMPTS
        return Bucket(tokens=B * self.tokens, decodes=rows, chunks=max(B, 8), rows=rows)


class Weights:
    """A model without weights, and flat random ones as the step takes them."""

    def __init__(self, spec: ModelSpec):
        graphdef, state = nnx.split(abstract_model(spec, dtype=DTYPE), nnx.Param)
        shapes, treedef = jax.tree.flatten(state)
        self.shape = step.ModelShape(graphdef=graphdef, treedef=treedef, layers=spec.layers)
        keys = jax.random.split(jax.random.key(0), len(shapes))
        self.leaves = [_weights(key, s.shape) for key, s in zip(keys, shapes, strict=True)]


@functools.partial(jax.jit, static_argnames="shape")
def _weights(key, shape: tuple[int, ...]) -> jax.Array:
    """A matrix that keeps the size of what it multiplies; a norm's scale of one."""
    if len(shape) < 2:
        return jnp.ones(shape, DTYPE)
    return jax.random.normal(key, shape, DTYPE) * DTYPE(math.prod(shape[:-1]) ** -0.5)


def adapter_arrays(spec: ModelSpec) -> step.AdapterArrays:
    """`ADAPTERS` adapters of `RANK` on all linears of the decoder."""
    pages = RANK // PAGE_RANKS
    page_SW = 1 + jnp.arange(ADAPTERS * pages, dtype=jnp.int32).reshape(ADAPTERS, pages)
    pools = {}
    sites = [site for site in spec.adapter_target.sites if site.name.startswith("decoder.")]
    for key, site in zip(jax.random.split(jax.random.key(1), len(sites)), sites, strict=True):
        rows = site.layers * (1 + ADAPTERS * pages) * PAGE_RANKS
        key_a, key_b = jax.random.split(key)
        pools[site.name] = LoraPool(
            a_RD=_rank_rows(key_a, rows, site.in_width),
            b_RE=_rank_rows(key_b, rows, site.out_width),
            scale_LS=jnp.ones((site.layers, ADAPTERS)),
            page_SW=page_SW,
            pages_S=jnp.full(ADAPTERS, pages, jnp.int32),
        )
    heads = ReplacedHeads(heads_DV=(), page_P=jnp.zeros(ADAPTERS, jnp.int32))
    return step.AdapterArrays(pools=pools, biases_LSE={}, heads=heads)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rank_rows(key, rows: int, width: int) -> jax.Array:
    return jax.random.normal(key, (rows, width), DTYPE) * DTYPE(width**-0.5)


type Carry = tuple[KVPages, SamplerState, jax.Array]


def carry(spec: ModelSpec, batch: Batch) -> Carry:
    """What steps hand on: a cache for the batch, the sampler's state, features of two images."""
    pages = 1 + batch.requests * batch.request_pages
    shape = (spec.layers * pages, spec.kv_heads, PAGE_TOKENS, spec.head_width)
    return (
        KVPages(k_PKpH=_pages(shape), v_PKpH=_pages(shape)),
        SamplerState.empty(max_requests=MAX_REQUESTS, vocab_rows=spec.vocab_rows),
        jnp.zeros((2 * spec.tokens_per_image, spec.width), DTYPE),
    )


@functools.partial(jax.jit, static_argnums=0)
def _pages(shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(2), shape, DTYPE)


def layout(spec: ModelSpec, batch: Batch) -> BatchLayout:
    return BatchLayout.of(batch.bucket, request_pages=spec.max_positions // PAGE_TOKENS)


def packed(spec: ModelSpec, batch: Batch) -> jax.Array:
    """The step's fields. A prompt begins with its image."""
    buffer, fields = layout(spec, batch).buffer()
    neutral(fields, vocab_rows=spec.vocab_rows, padding_row=MAX_REQUESTS)
    B, T = batch.requests, batch.requests * batch.tokens
    order = np.random.default_rng(0).permutation(B * batch.request_pages) + 1
    page_BW = order.reshape(B, batch.request_pages)
    request_T = np.repeat(np.arange(B), batch.tokens)
    position_T = np.tile(np.arange(batch.kv_tokens - batch.tokens, batch.kv_tokens), B)
    fields["token_row"][:T] = request_T
    fields["position"][:T] = position_T
    fields["page"][:T] = page_BW[request_T, position_T // PAGE_TOKENS]
    fields["offset"][:T] = position_T % PAGE_TOKENS
    if batch.adapters:  # neighbours share one, as the engine sorts requests
        fields["adapter"][:T] = request_T * batch.adapters // B
    fields["sample_index"][:B] = np.arange(1, B + 1) * batch.tokens - 1
    fields["state_row"][:B] = np.arange(B)
    if batch.tokens == 1:
        _fill_decodes(fields, batch, page_BW)
    else:
        _fill_chunks(fields, batch, page_BW)
        rows = position_T < spec.tokens_per_image
        fields["feature_row"][:T] = np.where(rows, position_T, -1)
        fields["token"][:T] = np.where(rows, spec.image_token_id, position_T)
    return jax.device_put(buffer)


def _fill_decodes(fields: Fields, batch: Batch, page_BW: np.ndarray) -> None:
    fields["token"][:] = -1  # the one that the step before sampled
    fields["decode_kv_len"][:] = batch.kv_tokens
    fields["decode_page"][:, : batch.request_pages] = page_BW
    fields["decode_count"][...] = batch.requests


def _fill_chunks(fields: Fields, batch: Batch, page_BW: np.ndarray) -> None:
    B = batch.requests
    fields["chunk_start"][:B] = np.arange(B) * batch.tokens
    fields["chunk_len"][:B] = batch.tokens
    fields["chunk_kv_len"][:B] = batch.kv_tokens
    fields["chunk_page"][:B, : batch.request_pages] = page_BW
    fields["chunk_count"][...] = B
