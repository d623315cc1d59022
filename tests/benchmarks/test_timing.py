"""Tests of the timing of programs, by a clock that only the program moves."""

import time

import pytest

from benchmarks.timing import ATTEMPTS, SAMPLES, WARM_UP_RUNS, time_program


def test_samples_disturbed_from_outside_are_taken_again(monkeypatch):
    disturbed_until = 2 * WARM_UP_RUNS + SAMPLES
    timing, runs = timed(lambda run: 5.0 if run < disturbed_until and run % 2 else 1.0, monkeypatch)
    assert timing.median_ms == timing.p90_ms == pytest.approx(1.0)
    assert runs == disturbed_until + SAMPLES


def test_of_samples_that_stay_unsteady_the_steadiest_count(monkeypatch):
    def took(run: int) -> float:
        attempt = max(0, run - 2 * WARM_UP_RUNS) // SAMPLES
        return 1.0 if run % 2 else (5.0, 4.0, 2.0, 3.0)[attempt]

    timing, runs = timed(took, monkeypatch)
    assert timing.spread == pytest.approx(2.0)
    assert runs == 2 * WARM_UP_RUNS + ATTEMPTS * SAMPLES


def test_steady_samples_are_taken_once(monkeypatch):
    timing, runs = timed(lambda run: 2.0, monkeypatch)
    assert (timing.median_ms, timing.spread) == (pytest.approx(2.0), pytest.approx(1.0))
    assert runs == 2 * WARM_UP_RUNS + SAMPLES


def timed(took, monkeypatch):
    """Times a program whose run number n takes `took(n)` milliseconds; and how many runs it had."""
    clock_s, runs = 0.0, 0

    def run(carry):
        nonlocal clock_s, runs
        clock_s += 1e-3 * took(runs)
        runs += 1
        return carry

    monkeypatch.setattr(time, "perf_counter", lambda: clock_s)
    return time_program(run, 0.0, (), calls=1, sample_ms=0.1), runs
