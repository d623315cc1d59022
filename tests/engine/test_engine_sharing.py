"""What requests share: pages, image features, adapters that come and go, and too little of each."""

import dataclasses
import shutil

import numpy as np
import pytest

from tests.engine.engines import (
    ADAPTERS,
    answer,
    engine_of,
    load,
    with_images,
)
from tests.fixed_policy import decided
from valora_jax.engine.rounds import Decision
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.errors import AdapterNotFoundError, OutOfCapacityError

QUESTION = "USER: Which sign is closer? ASSISTANT:"
LORA, OTHER, VISION = "a03_all_linear_lm_r16", "a19_attn_lm_r8_b", "a05_vision_proj_r8"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.fixture
def engine():
    engine = engine_of()
    load(engine, LORA, OTHER, VISION)
    return engine


@pytest.fixture
def uncached():
    """An engine whose requests share no pages."""
    engine = engine_of(prefix_cache=False)
    load(engine, LORA, OTHER, VISION)
    return engine


@pytest.fixture
def forgetful():
    """An engine that keeps no adapter on the host."""
    engine = engine_of(host_adapter_bytes=0)
    load(engine, LORA, OTHER, VISION, "a01_attn_lm_r8")
    return engine


def tokens_of(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("adapter", [None, LORA, VISION])
def test_a_shared_prefix_is_not_computed_again_and_changes_no_token(engine, uncached, adapter):
    prompts = [with_images("Describe the picture in a few words." * 2 + end, 7) for end in "abc"]
    want = tokens_of([uncached.generate(p, GREEDY, adapter=adapter)[0] for p in prompts])
    outputs = [engine.generate(p, GREEDY, adapter=adapter)[0] for p in prompts]
    assert tokens_of(outputs) == want
    length = len(outputs[0].prompt_token_ids)
    cached = [output.metrics.cached_tokens for output in outputs]
    assert cached == [0, *[(length - 1) // 16 * 16] * 2]


def test_other_images_and_other_adapters_share_nothing(engine):
    def cached(number: int, adapter: str | None) -> int:
        prompt = with_images("What is this? " * 4, number)
        return engine.generate(prompt, GREEDY, adapter=adapter)[0].metrics.cached_tokens

    assert cached(11, None) == 0
    for number, adapter in ((12, None), (11, LORA), (11, VISION)):
        assert cached(number, adapter) <= 1
    assert cached(11, None) > 16
    engine.load_adapter("name", ADAPTERS / LORA)
    assert cached(11, "name") == 0
    assert cached(11, "name") > 16
    engine.load_adapter("name", ADAPTERS / LORA)
    assert cached(11, "name") == 0
    engine.unload_adapter("name")


def test_prompts_that_are_scored_are_computed_whole(engine):
    params = dataclasses.replace(GREEDY, prompt_logprobs=0)
    for _ in range(2):
        (output,) = engine.generate(QUESTION * 2, params)
        assert output.metrics.cached_tokens == 0
        assert len(output.prompt_logprobs or ()) == len(output.prompt_token_ids)


def test_features_are_computed_once_for_all_who_see_the_same_picture(uncached):
    images = uncached.parts.core.images
    prompts = [with_images("first", 21), with_images("second", 22, 21), with_images("third", 21)]
    before = images.misses
    for adapter, new in ((None, 2), (LORA, 0), (VISION, 2), (VISION, 0)):
        uncached.generate(prompts, GREEDY, adapter=adapter)
        assert images.misses == (before := before + new)


def test_more_pictures_than_slots_take_turns(engine, uncached):
    prompts = [with_images("?", i, i + 1, i + 2) for i in range(30, 38)]
    want = [answer(uncached, prompt, max_tokens=12).token_ids for prompt in prompts]
    assert tokens_of(engine.generate(prompts, GREEDY)) == want


def test_a_prompt_longer_than_a_step_is_computed_in_chunks(engine, uncached):
    prompt = with_images("word " * 60, 4, 5)
    prompt["prompt"] = "word " * 30 + prompt["prompt"]
    (logits_TV,) = uncached.prompt_logits([prompt])
    assert len(logits_TV) > 3 * 64
    got = answer(engine, prompt, max_tokens=1)
    assert got.token_ids == [logits_TV[-1].argmax()]


def test_preempted_requests_give_the_same_answers(engine, uncached):
    """Four of them need twice the pages there are."""
    kinds = [
        dict(temperature=0),
        dict(temperature=1.0, seed=3, repetition_penalty=1.2, frequency_penalty=0.5),
        dict(temperature=0, presence_penalty=1.0, logprobs=1, prompt_logprobs=1),
        dict(temperature=0.8, seed=4, min_tokens=150),
    ]
    params = [SamplingParams(max_tokens=200, ignore_eos=True, **kind) for kind in kinds]
    prompts = [with_images("Tell a story. " * (4 + i), 40 + i) for i in range(4)]
    adapters = [None, LORA, VISION, None]
    want = [
        uncached.generate(p, s, adapter=a)[0]
        for p, s, a in zip(prompts, params, adapters, strict=True)
    ]
    got = engine.generate(prompts, params, adapter=adapters)
    assert tokens_of(got) == tokens_of(want)
    assert sum(output.metrics.preemptions for output in got) >= 2
    assert [output.metrics.preemptions for output in want] == [0] * 4
    assert [len(each.token_ids) for output in got for each in output.outputs] == [200] * 4
    scored, alone = got[2].prompt_logprobs or (), want[2].prompt_logprobs or ()
    for a, b in zip(scored[1:], alone[1:], strict=True):
        assert a is not None
        assert b is not None
        assert [(t, x.logprob) for t, x in a.items()] == [
            (t, pytest.approx(x.logprob, abs=5e-4)) for t, x in b.items()
        ]


def test_a_reload_does_not_touch_those_who_run(engine):
    want = {name: answer(engine, QUESTION, adapter=name, max_tokens=30) for name in (LORA, OTHER)}
    params = dataclasses.replace(GREEDY, max_tokens=30)
    engine.load_adapter("name", ADAPTERS / LORA)
    stream = engine.stream(QUESTION, params, adapter="name")
    queued = engine.stream(QUESTION, params, adapter="name")
    next(stream)
    info = engine.load_adapter("name", ADAPTERS / OTHER)
    versions = [i for i in engine.list_adapters() if i.ref.name == "name"]
    assert [(i.current, i.users) for i in versions] == [(False, 2), (True, 0)]
    (new,) = engine.generate(QUESTION, params, adapter="name")
    assert (new.outputs[0], new.adapter) == (want[OTHER], info.ref)
    for old in (stream, queued):
        *_, last = old
        assert (last.outputs[0], last.adapter) == (want[LORA], versions[0].ref)
    assert [i.ref for i in engine.list_adapters() if i.ref.name == "name"] == [info.ref]
    engine.unload_adapter("name")


def test_an_adapter_that_is_unloaded_in_use_finishes_and_goes(engine):
    want = answer(engine, QUESTION, adapter=LORA, max_tokens=30)
    engine.load_adapter("name", ADAPTERS / LORA)
    stream = engine.stream(QUESTION, dataclasses.replace(GREEDY, max_tokens=30), adapter="name")
    next(stream)
    engine.unload_adapter("name")
    with pytest.raises(AdapterNotFoundError, match="no adapter 'name'; loaded: "):
        engine.generate(QUESTION, GREEDY, adapter="name")
    with pytest.raises(AdapterNotFoundError):
        engine.unload_adapter("name")
    *_, last = stream
    assert last.outputs[0] == want
    assert "name" not in {info.ref.name for info in engine.list_adapters()}


def test_parts_may_go_once_they_are_combined(engine):
    engine.load_adapter("part", ADAPTERS / OTHER)
    engine.combine_adapters("sum", {"part": 1.0})
    engine.unload_adapter("part")
    got = answer(engine, QUESTION, adapter="sum", max_tokens=12)
    assert got == answer(engine, QUESTION, adapter=OTHER, max_tokens=12)
    with pytest.raises(AdapterNotFoundError):
        engine.combine_adapters("sum", {"part": 1.0})
    engine.unload_adapter("sum")


def test_a_task_head_answers_in_the_batch_of_those_who_write(engine):
    load(engine, "a10_new_head")
    prompts = [with_images("Which?", number) for number in (1, 2, 3)]
    alone = [engine.classify(prompt, adapter="a10_new_head")[0] for prompt in prompts]
    stream = engine.stream(QUESTION, GREEDY, adapter=LORA)
    next(stream)
    together = engine.classify(prompts, adapter="a10_new_head")
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a.logits, b.logits, atol=5e-4)
        assert sum(b.probs) == pytest.approx(1)
        assert len(b.logits) == 7
    stream.close()


def test_dropped_arrays_are_read_again(engine, forgetful):
    names = [LORA, OTHER, VISION, "a01_attn_lm_r8"]
    load(engine, *names)
    prompts = [with_images("Name it.", i) for i in range(8)]
    want = tokens_of(engine.generate(prompts, GREEDY, adapter=names * 2))
    assert not any(info.in_memory for info in forgetful.list_adapters())
    assert tokens_of(forgetful.generate(prompts, GREEDY, adapter=names * 2)) == want


def test_a_folder_that_changed_fails_who_needs_it_and_nobody_else(forgetful, tmp_path):
    names = [LORA, OTHER, VISION]
    want = [answer(forgetful, QUESTION, adapter=name, max_tokens=30) for name in names]
    shutil.copytree(ADAPTERS / LORA, tmp_path / "folder")
    forgetful.load_adapter("changed", tmp_path / "folder")
    shutil.copytree(ADAPTERS / OTHER, tmp_path / "folder", dirs_exist_ok=True)
    params = dataclasses.replace(GREEDY, max_tokens=30)
    streams = [forgetful.stream(QUESTION, params, adapter=name) for name in names]
    with pytest.raises(ValueError, match="has changed since it was loaded; load it again"):
        forgetful.generate([QUESTION, "Hi"], params, adapter=["changed", None])
    assert [[*stream][-1].outputs[0] for stream in streams] == want
    shutil.rmtree(tmp_path / "folder")
    with pytest.raises((ValueError, OSError), match="folder"):
        next(forgetful.stream(QUESTION, params, adapter="changed"))
    forgetful.unload_adapter("changed")
    assert answer(forgetful, QUESTION, adapter=LORA, max_tokens=30) == want[0]


def test_closing_an_engine_ends_its_requests_and_leaves_it_usable(engine):
    streams = [engine.stream(with_images("a", i), GREEDY, adapter=LORA) for i in range(6)]
    outputs = [next(stream) for stream in streams[:2]]
    with engine:
        pass
    assert not engine.parts.core.has_work
    assert not outputs[0].finished
    lasts = [[*stream][-1] for stream in streams]
    assert {last.outputs[0].finish_reason for last in lasts} == {"abort"}
    assert answer(engine, "Hi", max_tokens=2).finish_reason == "length"


def test_a_pinned_adapter_stays_while_others_take_turns():
    engine = engine_of(max_adapters=2, warm_up=False)
    names = ["a01_attn_lm_r8", "a02_attn_suffix_r4", "a06_qv_r64"]
    load(engine, *names)
    engine.pin_adapter(names[0])
    try:
        for name in names[1:] * 2:
            answer(engine, "x", adapter=name, max_tokens=1)
        pinned = [info for info in engine.list_adapters() if info.pinned]
        assert [info.ref.name for info in pinned] == names[:1]
        assert pinned[0].ref in engine.metrics().resident
        with pytest.raises(OutOfCapacityError, match="cannot be pinned"):
            engine.pin_adapter(names[1])
    finally:
        engine.unpin_adapter(names[0])
    for name in names[1:]:
        answer(engine, "x", adapter=name, max_tokens=1)
    assert pinned[0].ref not in engine.metrics().resident


def test_a_folder_that_changed_fails_once_where_nobody_else_was_to_be_served(forgetful, tmp_path):
    want = answer(forgetful, QUESTION, adapter=LORA, max_tokens=12)
    shutil.copytree(ADAPTERS / LORA, tmp_path / "folder")
    ref = forgetful.load_adapter("changed", tmp_path / "folder").ref
    shutil.rmtree(tmp_path / "folder")
    with decided(forgetful, Decision(only=frozenset([ref]))):
        running = forgetful.stream(QUESTION, GREEDY, adapter=LORA)
        next(running)
        with pytest.raises((ValueError, OSError), match="folder"):
            forgetful.generate(QUESTION, GREEDY, adapter="changed")
        assert [*running][-1].outputs[0] == want
    forgetful.unload_adapter("changed")
