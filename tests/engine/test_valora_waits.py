"""Nobody is held back longer than theta: random traces in simulated time, adversarial ones too."""

import collections
import dataclasses
import itertools
import math
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import pytest

from tests.engine.test_valora_policy import (
    LIMITS,
    WEAK,
    arrivals,
    longest_wait_s,
    simulation,
    steps_of,
    traits,
)
from valora_jax.engine import valora_policy
from valora_jax.engine.costs import StepTimes
from valora_jax.engine.policies import Unmerged
from valora_jax.replay.arrivals import Arrival, Lengths, make_trace, skewed
from valora_jax.replay.simulation import Device, Simulation, capacity


def spaced(trace: list[Arrival], *, device: Device, load: float, burst_s: float) -> list[Arrival]:
    """Puts arrivals off until no stretch of time offers more than `load` of what unmerged steps
    serve, and `burst_s` of work at once."""
    served_s, late = 0.0, []
    for arrival in trace:
        at_s = max(arrival.at_s, served_s - burst_s)
        rate = capacity([arrival], device=device, limits=LIMITS, traits=traits)
        served_s = max(served_s, at_s) + 1 / (load * rate)
        late.append(dataclasses.replace(arrival, at_s=at_s))
    return late


devices = st.builds(
    lambda step_ms, lora_ms, page_ms, merge_ms, noise: Device(
        times=StepTimes(step_ms=step_ms, lora_ms=lora_ms, page_ms=page_ms),
        merge_ms=merge_ms,
        noise=noise,
    ),
    step_ms=st.sampled_from([2.0, 5.0, 15.0]),
    lora_ms=st.sampled_from([0.3, 12.0, 30.0]),
    page_ms=st.sampled_from([0.03, 0.3]),
    merge_ms=st.sampled_from([4.0, 10.0, 40.0]),
    noise=st.sampled_from([0.0, 0.05]),
)
# Whose request comes next: mostly one's, one's and then another's, one stranger to a hot adapter.
whose = st.one_of(
    st.lists(st.sampled_from([0] * 8 + [1, 2, 3, None]), min_size=5, max_size=30),
    st.builds(
        lambda blocks: [a for a, n in blocks for _ in range(n)],
        st.lists(st.tuples(st.sampled_from([0, 2, 3]), st.integers(1, 8)), min_size=1, max_size=4),
    ),
    st.builds(
        lambda before, stranger, after: [0] * before + [stranger] + [0] * after,
        st.integers(1, 20),
        st.sampled_from([1, 2, None]),
        st.integers(1, 20),
    ),
)


@st.composite
def traces(draw) -> list[Arrival]:
    owners = draw(whose)
    sizes = st.tuples(st.sampled_from([1, 3, 20, 100, 300]), st.sampled_from([1, 2, 10, 40]))
    gaps = st.sampled_from([0.0, 0.0, 0.003, 0.05, 0.3])
    rows = draw(st.lists(st.tuples(gaps, sizes), min_size=len(owners), max_size=len(owners)))
    times = itertools.accumulate(gap for gap, _ in rows)
    return [
        Arrival(at_s=at_s, adapter=adapter, prompt_tokens=prompt, output_tokens=output)
        for at_s, adapter, (_, (prompt, output)) in zip(times, owners, rows, strict=True)
    ]


offers = dict(
    trace=traces(),
    device=devices,
    load=st.sampled_from([0.5, 0.9]),
    theta_s=st.sampled_from([0.1, 0.3, 1.0]),
    burst=st.sampled_from([0.0, 0.3]),
)


def for_ever(some_ms, everybody_ms, held):
    """In place of what would pay: all steps but those that theta asks for."""
    return valora_policy._Way(token_ms=some_ms / 2, patience=math.inf)


# What pays lets nobody wait near as long as theta: only where it never ends does theta show.
@pytest.mark.parametrize(("hold_back", "examples"), [(for_ever, 2000), (None, 300)])
def test_nobody_waits_longer_than_theta_and_a_step(hold_back, examples):
    kept = collections.Counter()

    @hypothesis.settings(max_examples=examples)
    @hypothesis.given(**offers)
    def offered(trace, device, load, theta_s, burst):
        trace = spaced(trace, device=device, load=load, burst_s=burst * theta_s)
        kept[keeps(trace, device=device, theta_s=theta_s)] += 1

    hold_back = hold_back or valora_policy._in_every_kth
    with mock.patch.object(valora_policy, "_in_every_kth", hold_back):
        offered()
    assert kept[False] <= 0.01 * kept[True]


def test_long_traces_near_the_capacity_keep_theta_wherever_unmerged_steps_would():
    """Chance alone brings more at once there than rows can take, and then nobody could keep it."""
    kept = collections.Counter()
    lengths = Lengths(images=0, text=(1, 400), output=(1, 40))

    @hypothesis.settings(max_examples=100)
    @hypothesis.given(
        device=devices,
        theta_s=st.sampled_from([0.1, 0.3, 1.0]),
        skew=st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.97]),
        adapters=st.sampled_from([2, 4, 16]),
        cv=st.sampled_from([0.5, 1.0, 2.0]),
        seed=st.integers(0, 2**20),
    )
    def offered(device, theta_s, skew, adapters, cv, seed):
        kind = dict(lengths=lengths, image_tokens=64, requests=150, cv=cv, seed=seed)
        trace = make_trace(skewed(adapters, skew), rate=1.0, **kind)
        rate = 0.9 * capacity(trace, device=device, limits=LIMITS, traits=traits)
        trace = make_trace(skewed(adapters, skew), rate=rate, **kind)
        kept[keeps(trace, device=device, theta_s=theta_s)] += 1

    offered()
    assert kept[True] > 0.2 * kept[False]


def keeps(trace, *, device, theta_s) -> bool:
    """Whether the wait is bounded; that it is wherever unmerged steps would bound it is asserted,
    and elsewhere that it is at most so much longer than theirs."""
    run = simulation(trace, device=device, traits=traits, max_wait_s=theta_s)
    longest_s = 0.0
    for step in iter(run.step, None):
        longest_s = max(longest_s, (step.ms + LIMITS.merge_chunk_ms) / 1e3)
        assert WEAK not in {r.adapter for r in step.requests} or step.decision.folded is None
    assert all(request.finished_s is not None for request in run.requests)
    wait_s, bound_s = longest_wait_s(run), theta_s + longest_s
    if wait_s <= bound_s:
        return True
    unmerged = Simulation(trace, Unmerged(), device=device, limits=LIMITS, traits=traits).run()
    assert bound_s < longest_wait_s(unmerged)
    assert wait_s <= longest_wait_s(unmerged) + bound_s
    return False


def test_of_those_who_wait_the_last_is_served_by_theta():
    prompts = [Arrival(at_s=1.0, adapter=2, prompt_tokens=250, output_tokens=1)] * 6
    with mock.patch.object(valora_policy, "_in_every_kth", for_ever):
        run = simulation(arrivals(*[(0.0, 0, 400)] * 2) + prompts, max_wait_s=0.5)
        steps_of(run)
    assert 0.4 < longest_wait_s(run) < 0.5
