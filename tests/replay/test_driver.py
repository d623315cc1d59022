"""Open-loop timing, on a clock that moves only when the core works or the driver sleeps."""

import pytest

from valora_jax.replay.arrivals import Arrival
from valora_jax.replay.driver import drive

STEP_S = 0.010


class FakeCore:
    """Serves one request a step; a request takes `steps` of them."""

    def __init__(self, *, steps: int):
        self.now_s, self.steps = 100.0, steps
        self.queue: list[int] = []
        self.added_s: dict[int, float] = {}
        self.ended_s: dict[int, float] = {}
        self.slept_s: list[float] = []

    @property
    def has_work(self) -> bool:
        return bool(self.queue)

    def add(self, number: int) -> None:
        self.added_s[number] = self.now_s
        self.queue += [number] * self.steps

    def step(self) -> None:
        self.now_s += STEP_S
        number = self.queue.pop(0)
        if number not in self.queue:
            self.ended_s[number] = self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds


def driven(*at_s: float, steps: int = 3) -> FakeCore:
    core = FakeCore(steps=steps)
    trace = [Arrival(at_s=s, adapter=None, prompt_tokens=1, output_tokens=1) for s in at_s]
    start_s = drive(core, trace, core.add, clock=lambda: core.now_s, sleep=core.sleep)
    assert start_s == 100.0
    assert len(core.ended_s) == len(trace)
    return core


def test_it_sleeps_only_while_there_is_nothing_to_do():
    core = driven(0.5, 1.0)
    assert core.slept_s == pytest.approx([0.5, 0.5 - 3 * STEP_S])
    assert core.added_s == pytest.approx({0: 100.5, 1: 101.0})


def test_who_comes_during_a_step_is_added_after_it():
    core = driven(0.0, 0.015)
    assert core.added_s == pytest.approx({0: 100.0, 1: 100.02})
    assert core.slept_s == []


def test_a_slow_engine_does_not_slow_the_requests_down():
    core = driven(*(0.01 * i for i in range(10)), steps=20)
    assert list(core.added_s.values()) == pytest.approx([100 + 0.01 * i for i in range(10)])
    assert core.ended_s[9] == pytest.approx(100 + 10 * 20 * STEP_S)


def test_all_may_come_at_once():
    core = driven(0.0, 0.0, 0.0)
    assert set(core.added_s.values()) == {100.0}


def test_a_trace_without_requests_ends_at_once():
    assert driven().slept_s == []
