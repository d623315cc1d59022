import dataclasses
import json

import pytest

from valora_jax.engine.policies import Merged, Unmerged
from valora_jax.replay.arrivals import Arrival
from valora_jax.replay.report import report, spread
from valora_jax.replay.simulation import Device, Simulation


def test_a_spread_of_one_value_is_that_value():
    assert dataclasses.astuple(spread([3.0])) == (3.0, 3.0, 3.0, 3.0)


def test_percentiles_are_values_that_occurred():
    got = spread(range(1, 101))
    assert (got.mean, got.p50, got.p90, got.p99) == (50.5, 51, 91, 100)


def test_a_report_has_the_times_that_users_saw():
    trace = [
        Arrival(at_s=1.0 + i, adapter=None, prompt_tokens=640, output_tokens=11) for i in range(3)
    ]
    run = Simulation(trace, Unmerged()).run()
    got = report(run)
    first = run.requests[0]
    assert got.first_token_ms.mean == pytest.approx(1e3 * (first.first_token_s - 1.0))
    assert got.token_ms.p50 == pytest.approx(1e3 * (first.finished_s - 1.0) / 11)
    assert got.paper_token_ms.p50 == pytest.approx(1e3 * (first.finished_s - 1.0) / 651)
    assert got.wait_ms.p99 == 0
    assert got.tokens_per_s == pytest.approx(33 / (run.requests[-1].finished_s - 1.0))
    assert got.switches == 0
    assert json.loads(json.dumps(dataclasses.asdict(got)))["mode_s"]["merged"] == 0


def test_a_report_says_how_the_device_spent_its_time():
    trace = [Arrival(at_s=0.0, adapter=1, prompt_tokens=10, output_tokens=50)]
    run = Simulation(trace, Merged(max_wait_s=1.0), device=Device(merge_ms=4.0)).run()
    got = report(run)
    assert got.switches == 1
    assert got.mode_s["merged"] > got.mode_s["unmerged"] > 0 == got.mode_s["mixture"]
    assert sum(got.mode_s.values()) == pytest.approx(run.now_s - 0.004)


def test_who_left_does_not_count():
    trace = [
        Arrival(at_s=0.0, adapter=a, prompt_tokens=10, output_tokens=n)
        for a, n in [(1, 90), (2, 5)]
    ]
    run = Simulation(trace, Unmerged())
    run.step()
    run.abort(1)
    got = report(run.run())
    assert got.tokens_per_s == pytest.approx(5 / run.requests[1].finished_s)
