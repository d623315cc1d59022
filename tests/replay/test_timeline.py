import pytest

from valora_jax.lora.mode import Mode
from valora_jax.replay.arrivals import Arrival
from valora_jax.replay.outcome import Outcome, RanStep, Served
from valora_jax.replay.timeline import timeline


def outcome() -> Outcome:
    """Two requests in one second; the second one waits for half of it, and a third never runs."""
    arrivals = [
        Arrival(at_s=at_s, adapter=0, prompt_tokens=4, output_tokens=4) for at_s in (0.0, 0.0, 0.9)
    ]
    return Outcome(
        served=[
            Served(arrival=arrivals[0], admitted_s=0.0, first_token_s=0.1, finished_s=0.5),
            Served(arrival=arrivals[1], admitted_s=0.5, first_token_s=0.6, finished_s=1.0),
            Served(arrival=arrivals[2]),
        ],
        steps=[
            RanStep(start_s=0.0, ms=300, mode=Mode.UNMERGED),
            RanStep(start_s=0.4, ms=200, mode=Mode.MIXTURE),
        ],
    )


def test_bins_hold_the_share_of_each_mode():
    got = timeline(outcome(), bins=4)
    assert got.bin_s == 0.25
    assert got.modes == {
        "unmerged": [1.0, 0.2, 0.0, 0.0],
        "merged": [0.0] * 4,
        "mixture": [0.0, 0.4, 0.4, 0.0],
    }


def test_bins_hold_who_runs_and_who_waits():
    got = timeline(outcome(), bins=2)
    assert got.running == [1.0, 1.0]
    assert got.waiting == pytest.approx([1.0, 0.2])


def test_a_step_is_split_over_its_bins():
    got = timeline(outcome(), bins=100)
    assert sum(got.modes["unmerged"]) * got.bin_s == pytest.approx(0.3, abs=0.01)
    assert sum(got.running) * got.bin_s == pytest.approx(1.0, abs=0.01)
