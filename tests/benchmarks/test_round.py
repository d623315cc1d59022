"""The case of the scheduling round is as large as its record says."""

from typing import get_args

import pytest

from benchmarks.round import ADAPTERS, PLACES, ROWS, WAITING, Case, Timing, record
from valora_jax.config import PolicyName


def test_the_record_says_what_is_asked_for():
    got = record("valora", "even", Timing(median_ms=0.5, p99_ms=0.7))
    assert (got["waiting"], got["adapters"]) == (WAITING, ADAPTERS) == (1000, 1000)
    assert (got["median_ms"], got["p99_ms"]) == (0.5, 0.7)


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_a_thousand_wait_of_a_thousand_adapters_before_every_round(policy):
    case = Case(policy, "even")
    for _ in range(3):
        waiting = case.scheduler.waiting
        assert len(waiting) == WAITING
        assert len({request.adapter for request in waiting}) >= ADAPTERS - ROWS
        ms, plan = case.round()
        assert ms > 0
        assert plan.tokens > 0
    assert len(case.places.residency.resident) == PLACES


def test_nine_in_ten_requests_bring_the_hot_adapter():
    case = Case("valora", "hot")
    adapters = [request.adapter.name for request in case.scheduler.waiting]
    assert adapters.count("adapter0") == pytest.approx(0.9 * WAITING, abs=1)


def test_rows_fill_up():
    case = Case("unmerged", "hot")
    for _ in range(60):
        case.round()
    assert len(case.scheduler.running) > ROWS // 2
