"""The Triton kernels of paged attention, interpreted, against NumPy and against XLA.

Unwritten places of the cache are NaN: a kernel that lets one into a result fails.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged_attention as op
from pallas_kernels.paged_attention.tiles import AttentionTiles, ChunkTile, DecodeTile
from tests.pallas_kernels import attention_steps as steps
from tests.pallas_kernels.hopper import interpret_kernels


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpret_kernels(monkeypatch)


def tiles(*, splits=1, step_tokens=64, rows=64) -> AttentionTiles:
    return AttentionTiles(
        decode=DecodeTile(step_tokens=step_tokens, splits=splits, warps=4, stages=3),
        chunk=ChunkTile(rows=rows, step_tokens=step_tokens, warps=4, stages=3),
    )


def attend(step, **more):
    return op.attend(*step.inputs, **step.keywords, implementation="triton", **more)


@pytest.mark.parametrize("name", steps.CASES)
def test_every_token_attends_to_its_own_past(name):
    step = steps.build(steps.CASES[name], unwritten=np.nan)
    step.check(*attend(step, tiles=tiles()))


@pytest.mark.parametrize("name", ["decodes_of_many_lengths", "mixed_step"])
def test_splits_are_merged(name):
    step = steps.build(steps.CASES[name], unwritten=np.nan)
    step.check(*attend(step, tiles=tiles(splits=3, step_tokens=16)))


def test_the_tiles_of_the_shapes_serve_a_mixed_step():
    step = steps.build(steps.CASES["pages_of_a_tile"], unwritten=np.nan)
    step.check(*attend(step))


def test_a_block_holds_whole_tokens_of_a_group():
    # 16 rows hold two tokens of seven heads; many blocks, chunk boundaries inside pages.
    step = steps.build(steps.CASES["seven_heads_share_one"], unwritten=np.nan)
    step.check(*attend(step, tiles=tiles(rows=16, step_tokens=16)))


def test_a_step_without_padding():
    step = steps.build(steps.CASES["mixed_step"], unwritten=np.nan, spare_tokens=0)
    step.check(*attend(step, tiles=tiles()))


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [(jnp.bfloat16, jnp.bfloat16), (jnp.float16, jnp.float16), (jnp.float32, jnp.bfloat16)],
)
def test_dtypes(dtype, cache_dtype):
    step = steps.build(
        steps.CASES["mixed_step"], unwritten=np.nan, dtype=dtype, cache_dtype=cache_dtype
    )
    # The weights of the softmax, the outputs and the rotated keys round to the narrow dtype.
    step.check(*attend(step, tiles=tiles()), {"rtol": 2**-6, "atol": 2**-6})


def test_rounding_agrees_with_xla():
    step = steps.build(steps.CASES["mixed_step"], unwritten=0.0, dtype=jnp.bfloat16)
    _, kv = attend(step, tiles=tiles())
    _, want = op.attend(*step.inputs, **step.keywords, implementation="xla")
    scratch = step.keywords["layer_page"]
    for got, xla in zip(jax.tree.leaves(kv), jax.tree.leaves(want), strict=True):
        got, xla = (np.delete(np.float32(x), scratch, 0) for x in (got, xla))
        # Keys that rotary puts halfway between two bfloat16 may go either way: fused multiply-adds.
        assert np.mean(got != xla) < 1e-3
        np.testing.assert_allclose(got, xla, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        (steps.Case(2, 2, 8, 16, [(3, 1)]), jnp.float32, "head width is 8, .* use 'xla'"),
        (steps.Case(2, 2, 48, 16, [(3, 1)]), jnp.float32, "head width is 48, .* powers of two"),
        (steps.Case(2, 2, 16, 24, [(3, 1)]), jnp.float32, "tokens a page is 24, .* use 'xla'"),
        (steps.Case(2, 2, 16, 16, [(3, 1)]), jnp.float8_e4m3fn, "dtype float8_e4m3fn, .* 'xla'"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(case, dtype, message):
    step = steps.build(case, unwritten=0.0, dtype=dtype)
    with pytest.raises(NotImplementedError, match=message):
        attend(step)
