import itertools

import pytest

from tests.engine.asking import Asking
from valora_jax.engine.costs import StepCosts
from valora_jax.engine.policies import DLora, Merged, Unmerged, make_policy
from valora_jax.engine.rounds import AdapterTraits, Copy, Decision, Round
from valora_jax.engine.valora_policy import Valora
from valora_jax.replay.simulation import step_limits

WEAK = "faint"


def round_of(*running: Asking, waiting=(), now_s: float = 0.1, copy: str | None = None) -> Round:
    return Round(
        now_s,
        running,
        waiting,
        copy=Copy(adapter=copy, fraction=1.0) if copy else Copy(),
        costs=StepCosts(),
        limits=step_limits(max_requests=8),
        traits=lambda adapter: AdapterTraits(pages=4.0, mergeable=adapter != WEAK),
    )


@pytest.mark.parametrize(
    ("name", "policy"),
    [("valora", Valora), ("unmerged", Unmerged), ("merged", Merged), ("dlora", DLora)],
)
def test_policies_have_names(name, policy):
    assert isinstance(make_policy(name, max_wait_s=0.5), policy)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'credit'; there are valora, unmerged, merged, dlora"):
        make_policy("credit", max_wait_s=0.5)


def test_a_wait_that_no_step_can_keep_is_refused():
    with pytest.raises(ValueError, match=r"max_wait_s=0 must be positive"):
        make_policy("valora", max_wait_s=0)


def test_unmerged_serves_everybody():
    assert Unmerged().decide(round_of(Asking("cars"), Asking(None), copy="cars")) == Decision()


class TestMerged:
    def test_begins_with_who_waits_longest_and_merges_its_adapter(self):
        policy = Merged(max_wait_s=0.5)
        requests = [Asking("cars", waiting_since_s=0.05), Asking("planes", waiting_since_s=0.01)]
        planes = frozenset(["planes"])
        assert policy.decide(round_of(*requests)) == Decision(only=planes, merge="planes")
        decision = policy.decide(round_of(*requests, copy="planes"))
        assert decision == Decision(folded="planes", only=planes)

    def test_stays_until_another_has_waited_too_long(self):
        policy = Merged(max_wait_s=0.5)
        policy.decide(round_of(Asking("planes")))
        cars = Asking("cars", waiting_since_s=0.1)
        for now_s, adapter in [(0.2, "planes"), (0.59, "planes"), (0.61, "cars")]:
            planes = Asking("planes", waiting_since_s=now_s)
            assert policy.decide(round_of(planes, cars, now_s=now_s)).only == {adapter}

    def test_stays_as_long_as_some_merges_take_when_everybody_waits_too_long(self):
        policy, served = Merged(max_wait_s=0.001), []
        cars, planes = Asking("cars", waiting_since_s=-1.0), Asking("planes", waiting_since_s=-1.0)
        for step in range(100):  # of 10 ms, as long as a merge
            (oldest,) = policy.decide(round_of(cars, planes, now_s=0.01 * step)).only
            served.append(oldest)
            (cars if oldest == "cars" else planes).waiting_since_s = 0.01 * step
        changes = sum(a != b for a, b in itertools.pairwise(served))
        assert 8 <= changes <= 10

    @pytest.mark.parametrize("adapter", [None, WEAK])
    def test_who_cannot_merge_is_served_unmerged(self, adapter):
        decision = Merged(max_wait_s=0.5).decide(round_of(Asking(adapter)))
        assert decision == Decision(only=frozenset([adapter]))


class TestDLora:
    HOT = (*(Asking("cars") for _ in range(7)), Asking("planes"))

    def test_merges_when_a_batch_is_all_of_one_adapter(self):
        policy = DLora(max_wait_s=0.5)
        cars = [Asking("cars")] * 4
        assert policy.decide(round_of(*cars)) == Decision(merge="cars")
        assert policy.decide(round_of(*cars, copy="cars")).folded == "cars"

    def test_serves_mixed_batches_unmerged(self):
        assert DLora(max_wait_s=0.5).decide(round_of(*self.HOT)) == Decision()

    def test_stays_merged_above_the_lower_share(self):
        policy = DLora(max_wait_s=0.5)
        policy._leave = 0.6
        policy.decide(round_of(*[Asking("cars")] * 8, copy="cars"))
        assert policy.decide(round_of(*self.HOT, copy="cars")).only == {"cars"}
        half = [Asking("cars")] * 4 + [Asking("planes")] * 4
        assert policy.decide(round_of(*half, copy="cars")) == Decision()

    def test_a_phase_that_did_not_pay_does_not_forbid_the_next(self):
        policy = DLora(max_wait_s=0.5)
        policy._leave = 0.6
        cars = [Asking("cars")] * 8
        policy.decide(round_of(*cars, copy="cars"))
        half = [Asking("cars")] * 4 + [Asking("planes")] * 4
        assert policy.decide(round_of(*half, copy="cars")) == Decision()
        assert policy.decide(round_of(*cars, copy="cars")).folded == "cars"

    def test_who_is_held_back_earns_credit_until_it_is_served_first(self):
        policy = DLora(max_wait_s=0.1)
        policy._leave = 0.6
        policy.decide(round_of(*[Asking("cars")] * 8, copy="cars"))
        decisions = [policy.decide(round_of(*self.HOT, copy="cars")) for _ in range(60)]
        held = [decision.only == {"cars"} for decision in decisions]
        first = held.index(False)
        assert 10 < first < 30  # 100 ms of merged steps
        assert not any(held[first : first + 3])  # until half of it is paid back

    def test_a_weak_adapter_never_merges(self):
        assert DLora(max_wait_s=0.5).decide(round_of(*[Asking(WEAK)] * 8)) == Decision()

    def test_an_unloaded_adapter_is_forgotten(self):
        policy = DLora(max_wait_s=0.5)
        policy.decide(round_of(*[Asking("cars")] * 8, copy="cars"))
        policy.forget("cars")
        assert policy.decide(round_of(Asking("planes"), Asking(None))) == Decision()
