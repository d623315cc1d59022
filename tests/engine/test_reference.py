"""The engine against transformers and PEFT, through the reference kit's own protocol."""

import numpy as np
import pytest

from tests.engine.engines import (
    ADAPTER_INDEX,
    CONFIG,
    GOLDENS,
    engine_of,
    load,
)
from tests.oracle_impl import Factory, Model

CASES = GOLDENS / "cases"
TINY = "llava15-tiny"
# Both sides compute in float32, in another order; the logits have a deviation of 2.4.
TOLERANCE = 5e-4
ALONE = sorted(
    path.stem
    for path in (CASES / TINY / "adapters").glob("*.npz")
    if "adapters" not in ADAPTER_INDEX[path.stem]
)


pytestmark = pytest.mark.usefixtures("nothing_is_left")


def model_of(name: str = TINY, **changes) -> Model:
    engine = engine_of(name, **changes)
    return Model(folder=GOLDENS / "checkpoints" / name, engine=engine, adapters={})


def case(name: str, model: str = TINY) -> dict[str, np.ndarray]:
    with np.load(CASES / model / f"{name}.npz") as file:
        return dict(file)


def check(model: Model, inputs, golden, adapters=None) -> None:
    """Logits at the golden's places, and greedy tokens without a stop."""
    logits_BTV = Factory().forward(model, inputs, adapters)
    for b, positions in enumerate(golden["logits_pos"]):
        np.testing.assert_allclose(
            logits_BTV[b, positions], golden["logits_at"][b], atol=TOLERANCE, rtol=0
        )
    assert golden["step_margin"].min() > 2 * TOLERANCE
    tokens_BN = golden["tokens"]
    got_BN = Factory().generate(model, inputs, tokens_BN.shape[1], None, -1, adapters)
    np.testing.assert_array_equal(got_BN, tokens_BN)


@pytest.mark.parametrize("name", ["single", "batch_mixed", "batch_left", "long_prompt"])
def test_logits_and_greedy_tokens_are_those_of_transformers(name):
    check(model_of(), case(name), case(name))


@pytest.mark.parametrize("name", ["llava15-tiny-gqa", "llava15-13b-tiny"])
def test_grouped_heads_and_other_layouts_compute_the_same(name):
    golden = case("single", name)
    check(model_of(name, warm_up=False), golden, golden)


def test_a_stop_token_ends_each_row_where_transformers_ends_it():
    inputs, golden = case("batch_left"), case("eos_stop")
    tokens_BN = golden["tokens"]
    stops, padding = golden["eos_token_id"].tolist(), 673
    got_BN = Factory().generate(model_of(), inputs, tokens_BN.shape[1], stops, padding)
    np.testing.assert_array_equal(got_BN, tokens_BN)


@pytest.mark.parametrize("name", ALONE)
def test_an_adapter_or_a_sum_of_them_computes_what_peft_computes(name):
    model, entry = model_of(), ADAPTER_INDEX[name]
    if "combine" in entry:
        parts = dict(entry["combine"])
        load(model.engine, *parts)
        model.engine.combine_adapters(name, parts, kind=entry["combination_type"])
    else:
        load(model.engine, name)
    with np.load(CASES / TINY / "adapters" / f"{name}.npz") as file:
        golden = {key.removeprefix("batch_mixed/"): file[key] for key in file}
    inputs = case("batch_mixed")
    check(model, inputs, golden, [name] * 4)
    if "class_logits" in golden:
        got_BC = Factory().class_logits(model, inputs, name)
        np.testing.assert_allclose(got_BC, golden["class_logits"], atol=TOLERANCE, rtol=0)
    model.engine.unload_adapter(name)


@pytest.mark.parametrize("name", ["m01_mixed_batch", "m02_mixed_batch_vision"])
def test_each_row_of_a_batch_has_its_own_adapter(name):
    model, entry = model_of(), ADAPTER_INDEX[name]
    load(model.engine, *(adapter for adapter in entry["adapters"] if adapter))
    golden = case(f"adapters/{name}")
    check(model, case(entry["base_case"]), golden, entry["adapters"])


def test_more_adapters_than_slots_take_turns():
    assert CONFIG.max_adapters == 3
    model, inputs = model_of(), case("batch_mixed")
    names = ["a01_attn_lm_r8", "a02_attn_suffix_r4", "a05_vision_proj_r8", "a07_patterns"]
    load(model.engine, *names)
    want = []
    for b, name in enumerate(names):
        with np.load(CASES / TINY / "adapters" / f"{name}.npz") as file:
            want.append(file["batch_mixed/tokens"][b])
    got_BN = Factory().generate(model, inputs, len(want[0]), None, -1, names)
    np.testing.assert_array_equal(got_BN, want)
