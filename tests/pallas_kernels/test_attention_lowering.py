"""The attention kernels at the shapes of real models, lowered for an H100 down to Triton IR."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import paged_attention as op
from tests.pallas_kernels.hopper import launches, lower_for_hopper

LAYERS, PAGES, PAGE_TOKENS, REQUEST_PAGES, CHUNKS = 2, 64, 64, 32, 8

# Query heads, key-value heads, head width.
MODELS = {"7b": (32, 32, 128), "13b": (40, 40, 128), "qwen2.5-7b": (28, 4, 128)}


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def lowered(heads, *, tokens: int, decodes: int, chunks: int, dtype=jnp.bfloat16) -> str:
    N, K, H = heads
    cache = jax.ShapeDtypeStruct((LAYERS * PAGES, K, PAGE_TOKENS, H), dtype)
    attend = functools.partial(op.attend, layer_page=PAGES, implementation="triton")
    return lower_for_hopper(
        attend,
        jax.ShapeDtypeStruct((tokens, (N + 2 * K) * H), dtype),
        jax.ShapeDtypeStruct((tokens, H // 2), jnp.float32),
        op.KVPages(k_PKpH=cache, v_PKpH=cache),
        page_T=ints(tokens),
        offset_T=ints(tokens),
        decodes=op.Decodes(
            kv_len_D=ints(decodes), page_DW=ints(decodes, REQUEST_PAGES), count=ints()
        ),
        chunks=op.Chunks(
            start_C=ints(chunks),
            len_C=ints(chunks),
            kv_len_C=ints(chunks),
            page_CW=ints(chunks, REQUEST_PAGES),
            count=ints(),
        )
        if chunks
        else None,
    )


@pytest.mark.parametrize("heads", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("decodes", [1, 32])
def test_a_decode_is_one_launch_a_layer(heads, decodes):
    assert launches(lowered(heads, tokens=decodes, decodes=decodes, chunks=0)) == 1


@pytest.mark.parametrize("heads", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("tokens", [256, 2048])
def test_a_mixed_step_is_three_launches_a_layer(heads, tokens):
    assert launches(lowered(heads, tokens=tokens, decodes=32, chunks=CHUNKS)) == 3


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_other_dtypes_lower(dtype):
    text = lowered(MODELS["7b"], tokens=256, decodes=32, chunks=CHUNKS, dtype=dtype)
    assert launches(text) == 3


@pytest.mark.parametrize("head_width", [16, 32, 64])
def test_narrow_heads_lower(head_width):
    assert launches(lowered((9, 3, head_width), tokens=256, decodes=32, chunks=CHUNKS)) == 3
