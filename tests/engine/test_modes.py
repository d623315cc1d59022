"""Merged steps, mixtures and unmerged steps answer the same, whatever is folded in and when."""

import dataclasses
import logging

import numpy as np
import pytest

from tests.engine.engines import (
    ADAPTER_INDEX,
    ADAPTERS,
    CONFIG,
    GOLDENS,
    answer,
    engine_of,
    load,
    with_images,
)
from tests.fixed_policy import Restless, Turns, decided, fold, ruled_by
from valora_jax.engine.engine import Engine
from valora_jax.engine.events import (
    AdapterEvicted,
    AdapterUnloaded,
    AdapterUploaded,
    MergeBegun,
    MergeWhole,
    StepRan,
)
from valora_jax.engine.rounds import Decision
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.lora.merged_copy import MergedCopy
from valora_jax.lora.mode import Mode
from valora_jax.lora.residency import REPLACED_HEADS

# Float32 in another order, and weights that were rounded once more; as against transformers.
TOLERANCE = 5e-4
SERVED = sorted(
    name
    for name, entry in ADAPTER_INDEX.items()
    if entry["expect"] == "ok" and (ADAPTERS / name).is_dir()
)
SPARE = "a19_attn_lm_r8_b"
OTHERS = ["a03_all_linear_lm_r16", "a07_patterns", "a17_lm_head_lora"]  # as many as have a place
PROMPT = with_images("the quick brown fox", 1)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.fixture
def engine():
    return engine_of()


@pytest.fixture
def modes(engine):
    modes = engine.parts.core.modes
    modes.tokens.clear()
    return modes


def only(mode: Mode, modes) -> None:
    assert {m for m, tokens in modes.tokens.items() if tokens} == {mode}


def logits(engine, adapters: list[str | None]) -> list[np.ndarray]:
    return engine.prompt_logits([PROMPT] * len(adapters), adapter=adapters)


@pytest.mark.parametrize("name", SERVED)
def test_an_adapter_computes_the_same_merged_as_on_the_base_weights(engine, modes, name):
    load(engine, name)
    [want_TV] = logits(engine, [name])
    ref = fold(engine, name)
    modes.tokens.clear()
    with decided(engine, Decision(folded=ref, only=frozenset([ref]))):
        [got_TV] = logits(engine, [name])
    only(Mode.MERGED, modes)
    np.testing.assert_allclose(got_TV, want_TV, atol=TOLERANCE, rtol=0)
    engine.unload_adapter(name)


def test_rows_on_anothers_copy_compute_the_same_as_on_the_base_weights(engine, modes):
    rows = [None, "a07_patterns", "a17_lm_head_lora", None]
    load(engine, SPARE, "a07_patterns", "a17_lm_head_lora")
    want = logits(engine, rows)
    for name in rows[1:3]:
        fold(engine, name)
    ref = fold(engine, SPARE)
    modes.tokens.clear()
    with decided(engine, Decision(folded=ref)):
        got = logits(engine, rows)
        tokens = [output.outputs[0].token_ids for output in generate(engine, rows)]
    only(Mode.MIXTURE, modes)
    for got_TV, want_TV in zip(got, want, strict=True):
        np.testing.assert_allclose(got_TV, want_TV, atol=TOLERANCE, rtol=0)
    assert tokens == [output.outputs[0].token_ids for output in generate(engine, rows)]


def generate(engine, adapters):
    return engine.generate([PROMPT] * len(adapters), GREEDY, adapter=adapters, show_progress=False)


def test_who_is_not_measured_yet_does_not_ride_on_anothers_copy(engine, modes):
    load(engine, SPARE, OTHERS[0])
    new, ref = fold(engine, OTHERS[0]), fold(engine, SPARE)
    modes.traits.forget(new)
    modes.tokens.clear()
    with decided(engine, Decision(folded=ref)):
        answer(engine, {"prompt_token_ids": [5] * 8}, adapter=OTHERS[0], max_tokens=1)
    only(Mode.UNMERGED, modes)


def test_answers_do_not_depend_on_when_the_mode_changes(engine, modes):
    names = [None, SPARE, "a03_all_linear_lm_r16", "a17_lm_head_lora"]
    load(engine, *names[1:])
    adapters = names * 3
    prompts = [with_images(f"number {i}", i % 4) for i in range(len(adapters))]
    params = [dataclasses.replace(GREEDY, max_tokens=4 + 3 * i) for i in range(len(adapters))]

    def tokens():
        outputs = engine.generate(prompts, params, adapter=adapters, show_progress=False)
        return [output.outputs[0].token_ids for output in outputs]

    want = tokens()
    modes.tokens.clear()
    switches = modes.orchestrator.switches
    with ruled_by(engine, Restless()):
        assert tokens() == want
    assert modes.orchestrator.switches > switches + 3
    assert all(modes.tokens[mode] > 0 for mode in Mode)


def test_hundreds_of_whole_changes_leave_no_trace(engine, modes):
    """The copy that served meanwhile is bit for bit one that is filled for the first time."""
    names = [SPARE, *OTHERS[:2]]
    load(engine, *names)
    refs = [fold(engine, name) for name in names]
    modes.orchestrator.costs.merge_ms = 1.0  # so quick that each step has a whole one
    params = dataclasses.replace(GREEDY, max_tokens=150)
    with ruled_by(engine, Turns(refs)):
        for _ in range(2):
            engine.generate([PROMPT] * 3, params, adapter=names, show_progress=False)
        assert modes.orchestrator.switches > 200
        assert modes.orchestrator.interrupted == 0
    copy, pools, f32 = modes.copy, modes._pools(), np.dtype(np.float32)
    linears = [linear for _, group in copy._groups for linear in group]
    fresh = MergedCopy(copy._base, linears, implementation=copy._implementation)
    for nth in range(fresh.layers):
        fresh.fill(nth, pools, slot=engine.parts.core.adapters.slot_of(refs[0]))
    fold(engine, names[0])
    for got, want in zip(copy.leaves(f32), fresh.leaves(f32), strict=True):
        np.testing.assert_array_equal(np.array(got), np.array(want))
    modes.orchestrator.costs.merge_ms = 10.0


def test_a_merge_goes_on_in_pieces_between_steps(engine, modes):
    load(engine, SPARE, OTHERS[0])
    ref = fold(engine, SPARE)
    orchestrator = modes.orchestrator
    fold(engine, OTHERS[0])
    orchestrator.costs.merge_ms = 1e6  # so slow that each layer has a step of its own
    fractions = []

    def hear(event) -> None:
        if isinstance(event, StepRan):
            fractions.append(orchestrator.copy.fraction)

    stop = engine.on_event(hear)
    with decided(engine, Decision(merge=ref)):
        answer(engine, PROMPT, adapter=SPARE, max_tokens=6)
    stop()
    # Steps are planned before the last ones are read.
    assert fractions == sorted(fractions)
    assert set(fractions[1:]) >= {0.75, 1.0}
    assert len(set(fractions)) == len([f for f in fractions if f < 1]) + 1
    assert orchestrator.copy.usable == ref


def test_unloading_the_merged_adapter_drops_its_copy(engine, modes, caplog):
    load(engine, SPARE)
    ref = fold(engine, SPARE)
    with caplog.at_level(logging.INFO, logger="valora_jax"):
        engine.unload_adapter(SPARE)
    [line] = [record.getMessage() for record in caplog.records]
    assert f"adapter {SPARE!r} version {ref.version} was unloaded while folded in" in line
    assert modes.orchestrator.copy.adapter is None
    load(engine, SPARE)
    # A policy that still asks for the version that is gone changes nothing.
    with decided(engine, Decision(folded=ref, merge=ref)):
        want = answer(engine, PROMPT, adapter=SPARE, max_tokens=4).token_ids
    assert answer(engine, PROMPT, adapter=SPARE, max_tokens=4).token_ids == want


def evict(engine, ref) -> None:
    """Lets other adapters take the place of a version that nobody uses."""
    for name in OTHERS:
        load(engine, name)
        answer(engine, PROMPT, adapter=name, max_tokens=1)
    assert engine.parts.core.adapters.slot_of(ref) is None


def test_an_adapter_that_was_evicted_is_merged_still_when_it_comes_back(engine, modes):
    load(engine, SPARE)
    want = answer(engine, PROMPT, adapter=SPARE, max_tokens=6).token_ids
    ref = fold(engine, SPARE)
    evict(engine, ref)
    modes.tokens.clear()
    switches = modes.orchestrator.switches
    with decided(engine, Decision(folded=ref, merge=ref)):
        answer(engine, PROMPT, max_tokens=2)  # on the base weights: there is nothing to subtract
        only(Mode.UNMERGED, modes)
        modes.tokens.clear()
        assert answer(engine, PROMPT, adapter=SPARE, max_tokens=6).token_ids == want
        only(Mode.MERGED, modes)
    assert modes.orchestrator.switches == switches


def test_a_merge_goes_on_in_the_place_that_its_adapter_comes_back_to(engine, modes):
    load(engine, SPARE, OTHERS[0])
    [want_TV] = logits(engine, [SPARE])
    fold(engine, OTHERS[0])
    modes.orchestrator.costs.merge_ms = 1e6  # a layer a step
    [ref] = [info.ref for info in engine.list_adapters() if info.ref.name == SPARE]
    with decided(engine, Decision(merge=ref)):
        answer(engine, PROMPT, adapter=SPARE, max_tokens=1)
    assert 0 < (begun := modes.orchestrator.copy.fraction) < 1
    evict(engine, ref)
    switches = modes.orchestrator.switches
    with decided(engine, Decision(merge=ref)):
        answer(engine, PROMPT, max_tokens=2)
        assert modes.orchestrator.copy.fraction == begun
        answer(engine, PROMPT, adapter=SPARE, max_tokens=6)
    assert (modes.orchestrator.copy.usable, modes.orchestrator.switches) == (ref, switches)
    modes.orchestrator.costs.merge_ms = 10.0
    modes.tokens.clear()
    with decided(engine, Decision(folded=ref)):
        [got_TV] = logits(engine, [SPARE])
    only(Mode.MERGED, modes)
    np.testing.assert_allclose(got_TV, want_TV, atol=TOLERANCE, rtol=0)


def test_an_adapter_that_a_running_request_brings_stays_merged_when_its_name_goes(engine, modes):
    load(engine, SPARE)
    ref = fold(engine, SPARE)
    want = answer(engine, PROMPT, adapter=SPARE, max_tokens=6).token_ids
    with decided(engine, Decision(folded=ref)):
        outputs = engine.stream(PROMPT, dataclasses.replace(GREEDY, max_tokens=6), adapter=SPARE)
        next(outputs)
        engine.unload_adapter(SPARE)
        assert modes.orchestrator.copy.usable == ref
        *_, last = outputs
    assert last.outputs[0].token_ids == want
    assert modes.orchestrator.copy.adapter is None


def test_a_merge_whose_requests_are_aborted_is_left_and_taken_up_again(engine, modes):
    load(engine, SPARE, "a03_all_linear_lm_r16")
    ref = fold(engine, SPARE)
    fold(engine, "a03_all_linear_lm_r16")
    modes.orchestrator.costs.merge_ms = 1e6
    with decided(engine, Decision(merge=ref)):
        outputs = engine.stream(PROMPT, GREEDY, adapter=SPARE)
        next(outputs)
        outputs.close()
        begun = modes.orchestrator.copy
        assert begun.adapter == ref
        assert begun.usable is None
        answer(engine, PROMPT, adapter=SPARE, max_tokens=8)
    assert modes.orchestrator.copy.usable == ref
    modes.orchestrator.costs.merge_ms = 10.0


def test_steps_are_timed_unless_something_was_compiled_for_them(engine, modes, monkeypatch):
    runner, ran, told = engine.parts.runner, [], []
    execute, enqueued = runner.execute, modes.enqueued

    def compiling(plan, folded):  # as if the second step's shape were new
        runner._functions.traces += len(told) == 1
        return execute(plan, folded)

    def hearing(*step, **how):
        told.append(how["compiled"])
        enqueued(*step, **how)

    monkeypatch.setattr(runner, "execute", compiling)
    monkeypatch.setattr(modes, "enqueued", hearing)
    stop = engine.on_event(ran.append)
    answer(engine, PROMPT, max_tokens=6)
    stop()
    assert told == [False, True, False, False, False, False]
    assert [type(event) for event in ran] == [StepRan] * 6
    assert all(step.ms >= 0 for step in ran)
    starts = [step.start_s for step in ran]
    assert starts == sorted(starts)
    assert sum(modes.orchestrator.seconds.values()) > 0


def test_images_count_in_the_step_that_they_are_encoded_for(engine):
    ran = []
    stop = engine.on_event(ran.append)
    for numbers in ((71, 72), (72, 73)):
        answer(engine, with_images("what are these?", *numbers), max_tokens=3)
    stop()
    encoded = [step.load.images for step in ran]
    assert [images for images in encoded if images] == [2, 1]  # one was known the second time


def unload_all(engine) -> None:
    for info in engine.list_adapters():
        engine.unload_adapter(info.ref.name)


def test_a_server_hears_all_that_becomes_of_an_adapter(engine, modes):
    unload_all(engine)
    heard = []
    stop = engine.on_event(heard.append)
    load(engine, SPARE)
    ref = fold(engine, SPARE)
    evict(engine, ref)
    engine.unload_adapter(SPARE)
    stop()
    load(engine, SPARE)
    slot = {event.adapter: event.slot for event in heard if isinstance(event, AdapterUploaded)}
    own = [event for event in heard if getattr(event, "adapter", None) == ref]
    assert own == [
        AdapterUploaded(adapter=ref, slot=slot[ref]),
        MergeBegun(adapter=ref),
        MergeWhole(adapter=ref),
        AdapterEvicted(adapter=ref),
        AdapterUnloaded(adapter=ref),
    ]
    assert [it.name for it in slot] == [SPARE, *OTHERS]
    assert any(isinstance(event, StepRan) for event in heard)


def test_the_engine_counts_what_its_steps_did(engine, modes):
    load(engine, SPARE)
    before = engine.metrics()
    ref = fold(engine, SPARE)
    with decided(engine, Decision(folded=ref, only=frozenset([ref]))):
        answer(engine, PROMPT, adapter=SPARE, max_tokens=4)
        during = engine.metrics()
    assert during.folded == ref
    assert ref in during.resident
    assert during.mode_tokens[Mode.MERGED] > 4
    assert during.mode_seconds[Mode.MERGED] > 0
    assert during.finished["length"] > before.finished.get("length", 0)
    assert (during.running, during.waiting) == (0, 0)
    assert during.mode_changes > before.mode_changes
    assert during.mode_seconds[Mode.UNMERGED] >= before.mode_seconds[Mode.UNMERGED] > 0


def test_the_engine_counts_what_became_of_merges(engine, modes):
    load(engine, SPARE, OTHERS[0])
    refs = [fold(engine, name) for name in (OTHERS[0], SPARE)]
    before = engine.metrics()
    modes.orchestrator.costs.merge_ms = 1e6  # a layer a step
    for ref in refs:  # the second one interrupts the first
        with decided(engine, Decision(merge=ref)):
            answer(engine, PROMPT, adapter=ref.name, max_tokens=1)
    during = engine.metrics()
    assert (during.switches, during.merge_ms) == (before.switches + 2, 1e6)
    assert during.interrupted_merges == before.interrupted_merges + 1
    assert (during.folded, during.refused_merges) == (None, before.refused_merges)
    modes.orchestrator.costs.merge_ms = 10.0
    engine.combine_adapters("strong", {SPARE: 1e6})
    answer(engine, PROMPT, adapter="strong", max_tokens=8)
    assert engine.metrics().refused_merges == before.refused_merges + 1
    assert engine.metrics().switches == during.switches
    engine.unload_adapter("strong")


def test_the_engine_counts_who_is_on_the_device(engine):
    unload_all(engine)
    before = engine.metrics()
    assert (before.resident, before.pinned) == ((), ())
    assert set(before.adapter_pages_in_use.values()) == {0}
    assert before.adapter_pages["decoder.q"] == CONFIG.lora_pages
    assert before.adapter_pages[REPLACED_HEADS] == CONFIG.max_replaced_heads
    load(engine, SPARE)
    engine.pin_adapter(SPARE)
    [ref] = [info.ref for info in engine.list_adapters()]
    during = engine.metrics()
    assert (during.resident, during.pinned) == ((ref,), (ref,))
    pages = {site: n for site, n in during.adapter_pages_in_use.items() if n}
    assert pages == {f"decoder.{linear}": 1 for linear in "qkvo"}
    engine.unpin_adapter(SPARE)
    evict(engine, ref)
    after = engine.metrics()
    assert after.adapter_uploads == before.adapter_uploads + 1 + len(OTHERS)
    assert after.adapter_evictions == before.adapter_evictions + 1
    assert (sorted(it.name for it in after.resident), after.pinned) == (OTHERS, ())


def test_without_a_copy_nobody_is_merged_and_everybody_served():
    engine = engine_of(merge="off", policy="valora", warm_up=False)
    load(engine, SPARE)
    modes = engine.parts.core.modes
    assert modes.copy is None
    want = answer(engine_of(), PROMPT, max_tokens=4).token_ids
    assert answer(engine, PROMPT, max_tokens=4).token_ids == want
    answer(engine, PROMPT, adapter=SPARE, max_tokens=4)
    assert set(modes.tokens) == {Mode.UNMERGED}


def test_memory_too_small_for_the_copy_is_said_once_and_serves_without(monkeypatch, caplog, engine):
    plan = engine.parts.memory
    taken_bytes = plan.adapters_bytes + plan.staged_bytes + plan.features_bytes + plan.sampler_bytes
    free_bytes = taken_bytes + plan.kv_pages * plan.page_bytes + plan.copy_bytes // 2
    monkeypatch.setattr("valora_jax.engine.start.free_device_bytes", lambda: free_bytes)
    config = dataclasses.replace(engine.config, memory_fraction=1.0, warm_up=False)
    model = GOLDENS / "checkpoints" / "llava15-tiny"
    with caplog.at_level(logging.WARNING), Engine(model, config, show_progress=False) as small:
        load(small, SPARE)
        assert small.parts.memory.copy_bytes == 0
        assert small.parts.core.modes.copy is None
        answer(small, PROMPT, adapter=SPARE, max_tokens=2)
    [line] = [r.getMessage() for r in caplog.records if "folded into the weights" in r.getMessage()]
    assert 'merge="off"' in line


@pytest.mark.parametrize("policy", ["valora", "merged", "dlora"])
def test_every_policy_serves_everybody(policy):
    names = [None, SPARE, "a03_all_linear_lm_r16", SPARE]
    wanted = engine_of()
    load(wanted, *names[1:])
    want = [output.outputs[0].token_ids for output in generate(wanted, names)]
    engine = engine_of(policy=policy, warm_up=False, max_wait_s=0.05)
    load(engine, *names[1:])
    for _ in range(3):
        assert [output.outputs[0].token_ids for output in generate(engine, names)] == want


def test_a_weak_adapter_is_refused_once_and_still_served(caplog):
    engine = engine_of(dtype="bfloat16", warm_up=False)
    modes = engine.parts.core.modes
    load(engine, SPARE)
    engine.combine_adapters("weak", {SPARE: 1e-4})
    with caplog.at_level(logging.WARNING):
        for name in (SPARE, "weak"):
            ref = fold(engine, name)
            for _ in range(2):  # the first asks the device
                modes.traits(ref)
                next(iter(modes.traits._pending.get(ref, {"": None}).values()), None)
            np.asarray(engine.prompt_logits([PROMPT], adapter=name)[0])
            assert modes.traits(ref).mergeable == (name == SPARE)
    [line] = [r.getMessage() for r in caplog.records if "served unmerged" in r.getMessage()]
    assert "'weak'" in line
    assert modes.traits.refused == 1
