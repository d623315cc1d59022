"""Rotary, cache writes and paged attention in XLA against NumPy; what the operator refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged_attention as op
from tests.pallas_kernels import attention_steps as steps

ODD = {
    "heads_of_eight": steps.Case(2, 1, 8, 16, [(0, 100)]),
    "pages_that_divide_no_tile": steps.Case(2, 2, 8, 24, [(30, 1), (20, 40)]),
}


@pytest.mark.parametrize("name", steps.CASES | ODD)
def test_every_token_attends_to_its_own_past(name):
    step = steps.build((steps.CASES | ODD)[name], unwritten=7.0)
    step.check(*op.attend(*step.inputs, **step.keywords, implementation="xla"))


def test_a_cache_narrower_than_the_arithmetic_rounds_once():
    step = steps.build(steps.CASES["mixed_step"], unwritten=7.0, cache_dtype=steps.BFLOAT16)
    out_TNH, kv = op.attend(*step.inputs, **step.keywords, implementation="xla")
    # One place: a key that lies between two bfloat16 may round to the other one.
    step.check(out_TNH, kv, {"rtol": 2**-7, "atol": 1e-3})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (9 * 16 + 8, r"152 columns, .* 2 heads of 16"),
        (9 * 16, r"144 columns, .* a multiple of 2"),
        (4 * 16, r"64 columns, .* a multiple of 2"),
    ],
)
def test_heads_that_do_not_fit_are_refused(columns, message):
    step = steps.build(steps.CASES["mixed_step"], unwritten=0.0)
    _, angle_Th, kv = step.inputs
    qkv_TE = jnp.zeros((len(angle_Th), columns))
    with pytest.raises(ValueError, match=message):
        op.attend(qkv_TE, angle_Th, kv, **step.keywords, implementation="xla")


def test_angles_of_another_width_are_refused():
    step = steps.build(steps.CASES["one_decode"], unwritten=0.0)
    qkv_TE, angle_Th, kv = step.inputs
    with pytest.raises(ValueError, match=r"angle_Th has shape \(4, 7\), want \(4, 8\)"):
        op.attend(qkv_TE, angle_Th[:, :7], kv, **step.keywords, implementation="xla")


def test_more_decode_rows_than_tokens_are_refused():
    step = steps.build(steps.CASES["one_decode"], unwritten=0.0, spare_tokens=0)
    with pytest.raises(ValueError, match="3 decode rows exceed T=1 tokens"):
        op.attend(*step.inputs, **step.keywords, implementation="xla")


def test_an_unknown_implementation_is_refused():
    step = steps.build(steps.CASES["one_decode"], unwritten=0.0)
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        op.attend(*step.inputs, **step.keywords, implementation="cuda")


def test_the_cache_is_updated_in_place_under_jit():
    step = steps.build(steps.CASES["mixed_step"], unwritten=0.0)
    qkv_TE, angle_Th, kv = step.inputs
    before = kv.k_PKpH.unsafe_buffer_pointer()

    def write(kv):
        return op.attend(qkv_TE, angle_Th, kv, **step.keywords, implementation="xla")[1]

    kv = jax.jit(write, donate_argnums=0)(kv)
    assert kv.k_PKpH.unsafe_buffer_pointer() == before
    assert np.isfinite(kv.k_PKpH).all()
