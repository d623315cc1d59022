import dataclasses

import ml_dtypes
import numpy as np
import pytest

from tests.lora.llava_tiny import GOLDENS, TARGET
from valora_jax.lora.adapter import Adapter, Linear, LoraPair
from valora_jax.lora.combine import combine, with_base
from valora_jax.lora.read import read_adapter

# The factors are rounded once to float32; the products below are taken in float64.
ROUNDED_FACTORS = dict(rtol=1e-6, atol=1e-7)
K, N = 6, 4


def golden(name: str) -> Adapter:
    return read_adapter(GOLDENS / name, name=name, target=TARGET)


def update(pair: LoraPair) -> np.ndarray:
    return pair.scale * np.float64(pair.a_RK).T @ np.float64(pair.b_RN)


def updates(adapter: Adapter) -> dict[tuple[str, int], np.ndarray]:
    return {(s, i): update(p) for s, layers in adapter.pairs.items() for i, p in layers.items()}


@pytest.mark.parametrize(
    "weights",
    [
        {"a01_attn_lm_r8": 0.7, "a19_attn_lm_r8_b": 0.6},
        {"a01_attn_lm_r8": 1.0, "a03_all_linear_lm_r16": -0.5, "a06_qv_r64": 0.8},
    ],
    ids=["same_rank", "mixed_rank"],
)
def test_cat_is_the_exact_sum_of_the_updates(weights):
    parts = [(golden(name), weight) for name, weight in weights.items()]
    got = updates(combine("sum", parts))
    singles = [(updates(adapter), weight) for adapter, weight in parts]
    assert set(got) == {place for one, _ in singles for place in one}
    for place, delta_KN in got.items():
        want_KN = sum(weight * one[place] for one, weight in singles if place in one)
        np.testing.assert_allclose(delta_KN, want_KN, **ROUNDED_FACTORS)


def test_cat_adds_ranks_and_keeps_a_lone_pair_as_it_is():
    qv, attention = golden("a06_qv_r64"), golden("a01_attn_lm_r8")
    summed = combine("sum", [(attention, 1.0), (qv, 2.0)])
    assert summed.rank_of("decoder.q") == 72
    assert summed.pairs["decoder.k"][0].a_RK is attention.pairs["decoder.k"][0].a_RK
    alone = combine("half", [(qv, 0.5)]).pairs["decoder.q"][0]
    assert alone.b_RN.dtype == ml_dtypes.bfloat16
    assert alone.scale == 0.5 * qv.pairs["decoder.q"][0].scale


def test_linear_mixes_the_factors_with_the_sign_on_a():
    first, second = golden("a01_attn_lm_r8"), golden("a19_attn_lm_r8_b")
    got = combine("mix", [(first, 0.7), (second, -0.6)], kind="linear").pairs["decoder.v"][2]
    one, two = first.pairs["decoder.v"][2], second.pairs["decoder.v"][2]
    x, y = np.sqrt(0.7 * one.scale), np.sqrt(0.6 * two.scale)
    a_RK = x * np.float64(one.a_RK) - y * np.float64(two.a_RK)
    b_RN = x * np.float64(one.b_RN) + y * np.float64(two.b_RN)
    np.testing.assert_allclose(got.a_RK, a_RK, **ROUNDED_FACTORS)
    np.testing.assert_allclose(got.b_RN, b_RN, **ROUNDED_FACTORS)
    assert (got.scale, got.rank) == (1.0, 8)


def test_linear_needs_equal_ranks():
    parts = [(golden("a01_attn_lm_r8"), 1.0), (golden("a06_qv_r64"), 1.0)]
    with pytest.raises(ValueError, match=r"decoder\.q 0 has the ranks \[8, 64\]"):
        combine("mix", parts, kind="linear")


def test_a_task_head_comes_from_the_one_part_that_has_it():
    headed, plain = golden("a10_new_head"), golden("a01_attn_lm_r8")
    assert combine("x", [(headed, 0.5), (plain, 0.5)]).task_head is headed.task_head
    with pytest.raises(ValueError, match="several parts have a task head"):
        combine("x", [(headed, 0.5), (headed, 0.5)])


def test_a_replaced_head_is_kept_at_weight_one_only():
    headed, plain = golden("a09_lm_head_saved"), golden("a01_attn_lm_r8")
    kept = combine("x", [(headed, 1.0), (plain, 0.5)])
    assert kept.replaced_head_VD is headed.replaced_head_VD
    with pytest.raises(ValueError, match=r"with weight 1; got 0\.5 \* a09_lm_head_saved"):
        combine("x", [(headed, 0.5), (plain, 0.5)])


@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(ValueError, match=f"has the weight {weight}"):
        combine("x", [(golden("a06_qv_r64"), weight)])


def test_nothing_and_parts_that_need_the_base_are_refused():
    with pytest.raises(ValueError, match="combines nothing"):
        combine("x", [])
    with pytest.raises(ValueError, match="call with_base first"):
        combine("x", [(golden("a17_lm_head_lora"), 1.0)])


def random_linear(seed: int, *, N: int, K: int, dtype=np.float16) -> Linear:
    rng = np.random.default_rng(seed)
    weight_NK = rng.standard_normal((N, K)).astype(dtype)
    return Linear(weight_NK=weight_NK, bias_N=rng.standard_normal(N).astype(dtype))


def no_head():
    raise AssertionError("the head was asked for")


def replacing(linear: Linear, **fields) -> Adapter:
    replaced = {"projector.linear_1": {0: linear}}
    return Adapter(name="x", source="s", pairs={}, replaced_linears=replaced, **fields)


@pytest.mark.parametrize(("N", "K"), [(8, 5), (5, 8), (6, 6)])
def test_a_replaced_linear_is_served_exactly_as_base_plus_difference(N, K):
    ours, base = random_linear(0, N=N, K=K), random_linear(1, N=N, K=K)
    settled = with_base(replacing(ours), linear_of=lambda *_: base, head_VD=no_head)
    pair = settled.pairs["projector.linear_1"][0]
    assert pair.rank == min(N, K)
    np.testing.assert_array_equal(base.weight_NK + update(pair).T, ours.weight_NK)
    np.testing.assert_array_equal(np.float32(base.bias_N) + pair.bias_N, ours.bias_N)
    assert not settled.needs_base


def test_lora_on_a_replaced_linear_is_kept():
    ours, base = random_linear(0, N=N, K=K), random_linear(1, N=N, K=K)
    lora = LoraPair(a_RK=np.ones((2, K), np.float32), b_RN=np.ones((2, N), np.float32), scale=0.5)
    adapter = dataclasses.replace(replacing(ours), pairs={"projector.linear_1": {0: lora}})
    pair = with_base(adapter, linear_of=lambda *_: base, head_VD=no_head).pairs[
        "projector.linear_1"
    ][0]
    want_KN = np.float64(ours.weight_NK).T - np.float64(base.weight_NK).T + update(lora)
    np.testing.assert_allclose(update(pair), want_KN, **ROUNDED_FACTORS)
    assert pair.bias_N is not None


def test_weighted_biases_add_up_in_cat_and_are_refused_in_linear():
    ours, base = random_linear(0, N=N, K=K), random_linear(1, N=N, K=K)
    settled = with_base(replacing(ours), linear_of=lambda *_: base, head_VD=no_head)
    bias_N = settled.pairs["projector.linear_1"][0].bias_N
    summed = combine("x", [(settled, 0.5), (settled, 0.25)])
    got_N = summed.pairs["projector.linear_1"][0].bias_N
    np.testing.assert_allclose(got_N, 0.75 * bias_N, rtol=1e-6)
    with pytest.raises(ValueError, match="has a bias, which 'linear' cannot mix"):
        combine("x", [(settled, 0.5), (settled, 0.25)], kind="linear")


def test_a_bias_for_a_linear_without_one_is_refused():
    base = Linear(weight_NK=np.zeros((N, K), np.float32))
    adapter = replacing(random_linear(0, N=N, K=K))
    with pytest.raises(ValueError, match=r"x: projector\.linear_1 0 brings a bias"):
        with_base(adapter, linear_of=lambda *_: base, head_VD=no_head)


def test_a_copy_of_the_base_head_is_dropped_and_a_trained_one_replaces_it():
    adapter = golden("a17_lm_head_lora")
    copy_VD = adapter.base_head_copy_VD
    base_VD = np.float32(copy_VD)
    finer_VD = base_VD * np.float32(1 + 2**-12)  # rounds to the copy, but is not it
    same = with_base(adapter, linear_of=lambda *_: None, head_VD=lambda: base_VD)
    other = with_base(adapter, linear_of=lambda *_: None, head_VD=lambda: finer_VD)
    assert same.replaced_head_VD is None
    assert other.replaced_head_VD is copy_VD
    assert not same.needs_base
    assert not other.needs_base


def test_an_adapter_that_needs_no_base_is_returned_as_it_is():
    adapter = golden("a06_qv_r64")
    assert with_base(adapter, linear_of=lambda *_: None, head_VD=no_head) is adapter
