import collections

import pytest

from tests.engine.asking import Asking
from valora_jax.engine.costs import StepCosts, StepLoad
from valora_jax.engine.orchestrator import Orchestrator
from valora_jax.engine.rounds import Adapter, AdapterTraits, ChunkLoad, Decision, Round
from valora_jax.lora.mode import Mode
from valora_jax.replay.simulation import step_limits


class Says:
    """A policy that always decides the same."""

    def __init__(self, decision: Decision):
        self.decision = decision
        self.forgotten = []

    def decide(self, round: Round) -> Decision:
        return self.decision

    def forget(self, adapter: Adapter) -> None:
        self.forgotten.append(adapter)


def orchestrator_of(decision: Decision = Decision(), *, rows: int = 2) -> Orchestrator:  # noqa: B008
    return Orchestrator(
        Says(decision),
        limits=step_limits(max_requests=rows, max_tokens_per_step=64, tokens_per_image=1),
        traits=lambda _: AdapterTraits(pages=4.0),
    )


def load_of(orchestrator: Orchestrator, chunks, folded) -> StepLoad:
    return orchestrator.load_of([ChunkLoad(*chunk) for chunk in chunks], folded)


def test_without_requests_there_is_nothing_to_decide():
    orchestrator = orchestrator_of(Decision(folded="cars", merge="cars"))
    assert orchestrator.decide(0.0, [], []) == Decision()


def test_a_copy_is_usable_once_it_is_whole():
    orchestrator = orchestrator_of()
    orchestrator.copied("cars", 0.5)
    assert (orchestrator.copy.adapter, orchestrator.copy.usable) == ("cars", None)
    orchestrator.copied("cars", 1.0)
    assert orchestrator.copy.usable == "cars"
    assert (orchestrator.switches, orchestrator.interrupted) == (1, 0)


def test_the_next_adapter_takes_the_copy_over_from_its_first_chunk():
    orchestrator = orchestrator_of()
    orchestrator.copied("cars", 1.0)
    orchestrator.copied("planes", 0.2)
    assert orchestrator.copy.usable is None
    assert (orchestrator.switches, orchestrator.interrupted) == (2, 0)


def test_a_merge_that_another_replaces_is_counted_as_interrupted():
    orchestrator = orchestrator_of()
    orchestrator.copied("cars", 0.2)
    orchestrator.copied("planes", 0.2)
    assert (orchestrator.switches, orchestrator.interrupted) == (2, 1)


@pytest.mark.parametrize(("fraction", "interrupted"), [(0.4, 1), (1.0, 0)])
def test_an_unloaded_adapter_loses_its_copy(fraction, interrupted):
    orchestrator = orchestrator_of()
    orchestrator.copied("cars", fraction)
    orchestrator.forget("cars")
    assert orchestrator.copy.adapter is None
    assert orchestrator.interrupted == interrupted
    assert orchestrator._policy.forgotten == ["cars"]


def test_unloading_another_adapter_leaves_the_copy():
    orchestrator = orchestrator_of()
    orchestrator.copied("cars", 1.0)
    orchestrator.forget("planes")
    assert orchestrator.copy.usable == "cars"


def test_no_policy_can_stall_the_engine():
    held = Decision(folded="cars", only=frozenset(["cars"]), merge="trains")
    orchestrator = orchestrator_of(held)
    rows = [Asking("planes"), Asking("planes")]
    assert orchestrator.decide(0.0, rows, [Asking("cars", 5)]) == Decision(merge="trains")


def test_the_policy_is_obeyed_as_long_as_somebody_is_served():
    held = Decision(folded="cars", only=frozenset(["cars"]))
    orchestrator = orchestrator_of(held)
    assert orchestrator.decide(0.0, [Asking("planes")], [Asking("cars", 5)]) == held


def test_steps_are_counted_by_the_mode_that_they_ran_in():
    orchestrator = orchestrator_of()
    steps = [
        ([("cars", 1)], None),
        ([("cars", 1)], "cars"),
        ([("cars", 1), ("planes", 1)], "cars"),
        ([(None, 1)], "cars"),
    ]
    for chunks, folded in steps:
        orchestrator.observe(load_of(orchestrator, chunks, folded), 250.0)
    assert orchestrator.seconds == {Mode.UNMERGED: 0.25, Mode.MERGED: 0.25, Mode.MIXTURE: 0.5}


def test_changes_of_mode_are_counted():
    orchestrator = orchestrator_of()
    base, merged = ([(None, 1)], None), ([("cars", 1)], "cars")
    for chunks, folded in (base, base, merged, base, merged, merged):
        orchestrator.count(load_of(orchestrator, chunks, folded), 5.0)
    assert orchestrator.mode_changes == 3


def test_another_policy_goes_on_with_the_copy_and_the_counters():
    orchestrator = orchestrator_of()
    orchestrator.copied("cars", 0.5)
    orchestrator.copied("planes", 0.5)
    orchestrator.observe(load_of(orchestrator, [(None, 1)], None), 250.0)
    orchestrator.set_policy(Says(Decision(merge="cars")))
    assert orchestrator.decide(0.0, [Asking("cars")], []) == Decision(merge="cars")
    assert orchestrator.copy.adapter == "planes"
    assert (orchestrator.switches, orchestrator.interrupted) == (2, 1)
    assert orchestrator.seconds[Mode.UNMERGED] == 0.25


def test_costs_may_be_brought_along():
    costs = StepCosts(merge_ms=3.0)
    orchestrator = Orchestrator(
        Says(Decision()),
        limits=step_limits(),
        traits=collections.defaultdict(lambda: AdapterTraits(pages=1.0)).__getitem__,
        costs=costs,
    )
    orchestrator.observe_merge(5.0)
    assert costs.merge_ms == pytest.approx(3.6)
