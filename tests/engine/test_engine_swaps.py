"""Requests go on while the adapters of others are on their way to the device."""

import threading
from concurrent import futures

import pytest

from tests.engine.engines import ADAPTERS, answer, engine_of, load
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.lora.read import read_adapter

QUESTION = "USER: Which sign is closer? ASSISTANT:"
LORA, OTHER = "a03_all_linear_lm_r16", "a19_attn_lm_r8_b"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.fixture
def engine():
    engine = engine_of()
    load(engine, LORA, OTHER)
    return engine


@pytest.fixture
def go_on(engine, monkeypatch):
    """Until it is set, no adapter comes to the device."""
    go_on, staging = threading.Event(), engine.parts.core.adapters._staging
    stage = staging._make

    def later(ref):
        assert go_on.wait(30)
        return stage(ref)

    monkeypatch.setattr(staging, "_make", later)
    yield go_on
    go_on.set()


@pytest.fixture
def aside():
    """Runs a function in a thread of its own; returns what ends when it has."""
    with futures.ThreadPoolExecutor() as threads:
        yield threads.submit


def uploads(engine) -> int:
    return engine.parts.core.adapters.uploads


def test_steps_of_others_run_while_an_adapter_is_on_its_way(engine, go_on):
    go_on.set()
    want = [answer(engine, QUESTION, adapter=name, max_tokens=12) for name in (LORA, OTHER)]
    go_on.clear()
    engine.load_adapter("new", ADAPTERS / OTHER)
    waiting = engine.stream(QUESTION, GREEDY, adapter="new")
    before = uploads(engine)
    *_, last = engine.stream(QUESTION, GREEDY, adapter=LORA)  # to its end
    assert (last.outputs[0], uploads(engine)) == (want[0], before)
    running = engine.stream(QUESTION, GREEDY, adapter=LORA)
    next(running)
    go_on.set()  # so that it is written between steps that use the first
    lasts = [[*stream][-1].outputs[0] for stream in (running, waiting)]
    assert (lasts, uploads(engine)) == (want, before + 1)
    engine.unload_adapter("new")


def test_steps_run_while_a_folder_is_read(engine, aside, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()

    def read_later(*args, **kwargs):
        reading.set()
        assert go_on.wait(30)
        return read_adapter(*args, **kwargs)

    monkeypatch.setattr("valora_jax.engine.adapters.read_adapter", read_later)
    loading = aside(engine.load_adapter, "new", ADAPTERS / OTHER)
    assert reading.wait(30)
    answering = aside(answer, engine, QUESTION, adapter=LORA, max_tokens=2)
    try:
        assert len(answering.result(30).token_ids) == 2
        assert "new" not in {info.ref.name for info in engine.list_adapters()}
    finally:
        go_on.set()
    assert loading.result(30).ref.name == "new"
    engine.unload_adapter("new")


def test_steps_run_while_a_pinned_adapter_is_on_its_way(engine, go_on, aside):
    ref = engine.load_adapter("new", ADAPTERS / OTHER).ref
    pinning = aside(engine.pin_adapter, "new")
    for _ in range(2):
        assert len(answer(engine, QUESTION, adapter=LORA, max_tokens=2).token_ids) == 2
    assert ref not in engine.metrics().resident
    assert not pinning.done()
    go_on.set()
    pinning.result(30)
    assert ref in engine.metrics().resident
    engine.unload_adapter("new")


@pytest.mark.parametrize("end", ["abort", "unload"])
def test_a_request_may_end_while_its_adapter_is_on_its_way(engine, go_on, end):
    engine.load_adapter("new", ADAPTERS / OTHER)
    before = uploads(engine)
    waiting = engine.stream(QUESTION, GREEDY, adapter="new")
    engine.generate(QUESTION, GREEDY)  # some steps
    if end == "unload":
        engine.unload_adapter("new")
    waiting.close()
    go_on.set()
    engine.generate(QUESTION, GREEDY)
    assert uploads(engine) == before
    if end == "abort":
        engine.unload_adapter("new")


def test_closing_an_engine_drops_adapters_on_their_way(engine, go_on):
    engine.load_adapter("new", ADAPTERS / OTHER)
    before = uploads(engine)
    waiting = engine.stream(QUESTION, GREEDY, adapter="new")
    engine.generate(QUESTION, GREEDY)
    going_on = threading.Timer(0, go_on.set)
    going_on.start()
    with engine:
        pass
    going_on.join()
    *_, last = waiting
    assert (last.outputs[0].finish_reason, uploads(engine)) == ("abort", before)
    engine.unload_adapter("new")


def test_more_adapters_than_places_take_turns(engine):
    names = [f"new{i}" for i in range(6)]
    for name in names:
        engine.load_adapter(name, ADAPTERS / (LORA if int(name[-1]) % 2 else OTHER))
    want = {name: answer(engine, QUESTION, adapter=name, max_tokens=12) for name in (LORA, OTHER)}
    outputs = engine.generate([QUESTION] * 12, GREEDY, adapter=names * 2)
    for name, output in zip(names * 2, outputs, strict=True):
        assert output.outputs[0] == want[LORA if int(name[-1]) % 2 else OTHER]
    for name in names:
        engine.unload_adapter(name)
