import dataclasses
import json

import pytest

from valora_jax.engine.costs import Mode
from valora_jax.engine.policies import Merged, Unmerged
from valora_jax.replay.arrivals import Arrival
from valora_jax.replay.outcome import Outcome, RanStep, Served
from valora_jax.replay.report import Slo, report, spread
from valora_jax.replay.simulation import Device, Simulation


def served(at_s: float, admitted_s: float, first_s: float, end_s: float, *, output: int) -> Served:
    arrival = Arrival(at_s=at_s, adapter=0, prompt_tokens=40, output_tokens=output)
    return Served(arrival=arrival, admitted_s=admitted_s, first_token_s=first_s, finished_s=end_s)


def test_a_spread_of_one_value_is_that_value():
    assert dataclasses.astuple(spread([3.0])) == (3.0, 3.0, 3.0, 3.0)


def test_percentiles_are_values_that_occurred():
    got = spread(range(1, 101))
    assert (got.mean, got.p50, got.p90, got.p99) == (50.5, 51, 91, 100)


def test_a_report_has_the_times_that_users_saw():
    got = report(
        Outcome(
            served=[
                served(1.0, 1.1, 1.2, 2.1, output=10),
                served(2.0, 2.2, 2.5, 2.5, output=1),
                Served(arrival=Arrival(at_s=3.0, adapter=1, prompt_tokens=9, output_tokens=9)),
            ],
            steps=[],
        )
    )
    assert (got.requests, got.unserved) == (2, 1)
    assert got.token_ms.mean == pytest.approx((1100 / 10 + 500 / 1) / 2)
    assert got.paper_token_ms == pytest.approx((1100 + 500) / (50 + 41))
    assert got.first_token_ms.p50 == pytest.approx(500)
    assert got.next_token_ms.mean == pytest.approx(900 / 9)
    assert got.wait_ms.mean == pytest.approx(150)
    assert got.seconds == pytest.approx(1.5)
    assert got.tokens_per_s == pytest.approx(11 / 1.5)
    assert got.requests_per_s == pytest.approx(2 / 1.5)


def test_goodput_counts_who_met_both_bounds():
    outcome = Outcome(
        served=[
            served(0.0, 0.0, 0.1, 1.0, output=10),  # 100 ms to the first token, 100 to each more
            served(0.0, 0.0, 0.3, 1.2, output=10),  # a late first token
            served(0.0, 0.0, 0.1, 2.0, output=10),  # slow ones after it
            served(0.0, 0.0, 0.1, 0.1, output=1),  # no more to be slow
        ],
        steps=[],
    )
    assert report(outcome, Slo(ttft_ms=200, tpot_ms=150)).goodput_per_s == 2 / 2.0
    assert report(outcome, Slo(ttft_ms=50, tpot_ms=150)).goodput_per_s == 0


@pytest.mark.parametrize("ms", [0, float("nan")])
def test_an_objective_is_positive(ms):
    with pytest.raises(ValueError, match=f"tpot_ms={ms} must be positive"):
        Slo(tpot_ms=ms)


def test_answers_of_one_token_have_no_next_one():
    got = report(Outcome(served=[served(0.0, 0.0, 0.1, 0.1, output=1)], steps=[]))
    assert got.next_token_ms is None


def test_no_latency_where_nobody_was_served():
    gone = Served(arrival=Arrival(at_s=0.0, adapter=None, prompt_tokens=1, output_tokens=1))
    with pytest.raises(ValueError, match="none of 1 requests ended"):
        report(Outcome(served=[gone], steps=[]))


def test_a_report_says_how_the_device_spent_its_time():
    steps = [
        RanStep(start_s=0.0, ms=20.0, mode=Mode.UNMERGED),
        RanStep(start_s=0.02, ms=8.0, mode=Mode.MERGED),
        RanStep(start_s=0.03, ms=12.0, mode=Mode.MERGED),
        RanStep(start_s=0.05, ms=40.0, mode=Mode.MIXTURE, prompt_tokens=600),
    ]
    one = [served(0.0, 0.0, 0.1, 0.2, output=2)]
    got = report(Outcome(served=one, steps=steps, switches=3, interrupted=1, refused=2, uploads=4))
    assert got.mode_s == pytest.approx({"unmerged": 0.02, "merged": 0.02, "mixture": 0.04})
    assert (got.decode_ms.p50, got.longest_decode_ms) == (12.0, 20.0)
    assert (got.switches, got.interrupted, got.refused, got.uploads) == (3, 1, 2, 4)
    assert json.loads(json.dumps(dataclasses.asdict(got)))["mode_s"]["mixture"] == 0.04


def test_a_report_of_a_simulation_adds_up():
    trace = [Arrival(at_s=0.0, adapter=1, prompt_tokens=10, output_tokens=50)]
    run = Simulation(trace, Merged(max_wait_s=1.0), device=Device(merge_ms=4.0)).run()
    got = report(run.outcome())
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
    got = report(run.run().outcome())
    assert (got.requests, got.unserved) == (1, 1)
    assert got.tokens_per_s == pytest.approx(5 / run.requests[1].finished_s)
