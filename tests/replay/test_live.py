"""A replay through a tiny engine: every request ends, and the figures add up."""

import dataclasses

import pytest

from tests.engine.engines import CONFIG, assert_nothing_is_held, engine_of
from valora_jax.config import EngineConfig
from valora_jax.replay.arrivals import Arrival, at_once, without_adapters
from valora_jax.replay.live import LiveSystem, engine_config
from valora_jax.replay.points import Point
from valora_jax.replay.random_adapters import adapter_name
from valora_jax.replay.records import record_of
from valora_jax.replay.report import report
from valora_jax.replay.settings import ReplaySettings

SETTINGS = ReplaySettings(simulate=True, ranks=(8, 20))


@pytest.fixture(scope="module")
def system():
    engine = engine_of()
    yield LiveSystem(engine.parts, SETTINGS, engine.config, adapters=2)
    for number in range(2):
        engine.unload_adapter(adapter_name(number))
    assert_nothing_is_held()


def trace_of(system: LiveSystem, *, requests: int = 12) -> list[Arrival]:
    """Requests of two adapters and of none, every other one with an image."""
    return [
        Arrival(
            at_s=0.01 * i,
            adapter=None if i % 3 == 2 else i % 3,
            prompt_tokens=system.image_tokens * (i % 2) + 3 + i,
            output_tokens=2 + i % 4,
            images=i % 2,
        )
        for i in range(requests)
    ]


def test_every_request_ends_and_the_figures_add_up(system):
    trace = trace_of(system)
    outcome = system.replay(trace, "valora")
    assert [served.arrival for served in outcome.served] == trace
    for served in outcome.served:
        times = (served.arrival.at_s, served.admitted_s, served.first_token_s, served.finished_s)
        assert list(times) == sorted(times)
    got = report(outcome)
    assert (got.requests, got.unserved) == (12, 0)
    assert got.tokens_per_s * got.seconds == pytest.approx(sum(a.output_tokens for a in trace))
    assert 0 < sum(got.mode_s.values()) <= got.seconds + trace[0].at_s + 1e-6
    # The pool has room for both.
    assert got.uploads <= 2


def test_a_replay_begins_with_an_empty_copy(system):
    trace = at_once(trace_of(system, requests=6))
    switches = [system.replay(trace, "merged").switches for _ in range(2)]
    assert min(switches) > 0


def test_without_adapters_no_step_is_merged(system):
    outcome = system.replay(without_adapters(trace_of(system, requests=4)), "unmerged")
    assert {step.mode.value for step in outcome.steps} == {"unmerged"}
    assert (outcome.switches, outcome.interrupted) == (0, 0)


def test_a_simulation_of_the_same_trace_is_compared(system):
    trace = trace_of(system, requests=6)
    assert system.capacity(trace) > 0
    outcome, predicted = system.replay(trace, "merged"), system.predict(trace, "merged")
    point = Point(kind="tiny", adapters=2, spread="skew 0", load=None, rate=1.0, trace=trace)
    record = record_of(
        point,
        "merged",
        outcome,
        predicted=predicted,
        settings=SETTINGS,
        device=system.device,
        command="",
    )
    measured_ms, simulated_ms = record["token_ms"]["mean"], record["simulated_token_ms"]
    error = record["simulator_error_percent"]
    assert simulated_ms == pytest.approx(measured_ms * (1 + error / 100))


def test_a_request_that_does_not_fit_is_refused_before_the_replay(system):
    trace = trace_of(system, requests=3)
    trace[2] = dataclasses.replace(trace[2], prompt_tokens=600)
    with pytest.raises(ValueError, match="raise --engine"):
        system.replay(trace, "unmerged")
    assert not system._parts.core.has_work


def test_the_pool_holds_all_adapters_or_as_many_as_are_to_be_resident():
    settings = dataclasses.replace(SETTINGS, engine=EngineConfig(max_requests=9), ranks=(8, 64))
    everybody = engine_config(settings, adapters=5)
    assert (everybody.max_adapters, everybody.lora_pages) == (5, 3 * 1 + 2 * 4)
    some = engine_config(dataclasses.replace(settings, resident=2), adapters=5)
    assert (some.max_adapters, some.lora_pages, some.max_requests) == (2, 2 * 4, 9)
    assert CONFIG.max_waiting < some.max_waiting
