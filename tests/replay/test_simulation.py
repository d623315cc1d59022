import dataclasses
import itertools

import pytest

from valora_jax.engine.costs import Mode, StepCosts, StepLoad, StepTimes
from valora_jax.engine.policies import Merged, Unmerged, make_policy
from valora_jax.engine.rounds import AdapterTraits
from valora_jax.replay.arrivals import Arrival, make_trace, skewed
from valora_jax.replay.simulation import Device, Simulation, capacity, step_limits

LIMITS = step_limits(max_requests=2, max_tokens_per_step=100, tokens_per_image=16)
# A step takes 10 ms, and a prompt token 0.1 ms more; LoRA 5 ms.
ROUND = Device(
    times=StepTimes(
        step_ms=10.0,
        decode_ms=0.0,
        prompt_token_ms=0.1,
        image_ms=0.0,
        lora_ms=5.0,
        prompt_lora_ms=0.0,
        page_ms=0.0,
        token_page_ms=0.0,
    ),
    merge_ms=5.0,
)


def arrival(at_s: float = 0.0, *, adapter: int | None = None, prompt: int = 50, output: int = 3):
    return Arrival(at_s=at_s, adapter=adapter, prompt_tokens=prompt, output_tokens=output)


def run_of(*trace: Arrival, policy=None) -> Simulation:
    return Simulation(trace, policy or Unmerged(), device=ROUND, limits=LIMITS).run()


def test_a_request_alone_takes_its_prompt_and_its_decodes():
    [request] = run_of(arrival(1.0)).requests
    assert request.admitted_s == 1.0
    assert request.first_token_s == pytest.approx(1.015)
    assert request.finished_s == pytest.approx(1.035)


def test_an_adapter_costs_what_the_device_takes_for_it():
    [request] = run_of(arrival(adapter=7)).requests
    assert request.finished_s == pytest.approx(0.035 + 3 * 0.005)


def test_a_long_prompt_takes_several_steps():
    [request] = run_of(arrival(prompt=250, output=1)).requests
    assert request.finished_s == pytest.approx(0.020 + 0.020 + 0.015)


def test_decodes_and_a_newcomer_share_a_step():
    first, second = run_of(arrival(), arrival(0.001)).requests
    assert second.admitted_s == first.first_token_s
    assert first.finished_s == pytest.approx(0.015 + 0.015 + 0.010)


def test_who_finds_no_row_waits_for_one():
    *_, third = run_of(arrival(output=4), arrival(output=6), arrival()).requests
    assert third.admitted_s == pytest.approx(0.020 + 3 * 0.010)
    assert third.longest_wait_s == third.admitted_s


def test_a_merge_takes_its_time_between_steps_and_then_pays():
    run = Simulation(
        [arrival(adapter=7, output=6)], Merged(max_wait_s=1.0), device=ROUND, limits=LIMITS
    )
    steps = list(iter(run.step, None))
    assert [step.mode for step in steps] == [Mode.UNMERGED] * 3 + [Mode.MERGED] * 3
    gaps = [b.start_s - a.start_s - a.ms / 1e3 for a, b in itertools.pairwise(steps)]
    assert gaps == pytest.approx([0.002, 0.002, 0.001, 0, 0])


def test_equal_seeds_give_equal_runs():
    trace = make_trace(skewed(4, 0.5), rate=20.0, requests=30)
    ends = [
        Simulation(
            trace, make_policy("valora", max_wait_s=0.5), device=Device(noise=0.1), seed=seed
        )
        .run()
        .now_s
        for seed in (1, 1, 2)
    ]
    assert ends[0] == ends[1] != ends[2]


def test_an_abort_takes_only_who_has_come():
    run = Simulation(
        [arrival(adapter=1), arrival(adapter=2), arrival(5.0, adapter=1)], Unmerged(), device=ROUND
    )
    run.abort(1)
    run.run()
    assert [request.finished_s is not None for request in run.requests] == [False, True, True]


def test_capacity_is_what_saturated_unmerged_steps_serve():
    trace = make_trace(skewed(8, 0.5), rate=1.0, requests=150)
    at_once = [
        Arrival(
            at_s=0.0,
            adapter=a.adapter,
            prompt_tokens=a.prompt_tokens,
            output_tokens=a.output_tokens,
        )
        for a in trace
    ]
    for traits in (lambda _: AdapterTraits(pages=4.0), lambda _: AdapterTraits(pages=0.0)):
        run = Simulation(at_once, Unmerged(), traits=traits).run()
        rate = capacity(trace, device=Device(), limits=step_limits(), traits=traits)
        assert len(trace) / run.now_s == pytest.approx(rate, rel=0.15)


def test_a_device_can_take_what_an_engine_has_learnt():
    costs = StepCosts(merge_ms=7.0)
    load = StepLoad(
        bucket=None,
        mode=Mode.UNMERGED,
        decodes=4,
        prompt_tokens=0,
        images=0,
        pages=0.0,
        token_pages=0.0,
    )
    for _ in range(100):
        costs.observe(load, 40.0)
    device = Device.learnt(costs)
    for _ in range(100):
        costs.observe(load, 80.0)  # the engine goes on; the device stays as it was
    assert device.times.of(load) == pytest.approx(40, rel=0.01)
    assert device.merge_ms == 7.0


def test_a_policy_can_know_the_device_from_the_start():
    trace = [arrival(adapter=1), arrival(adapter=2)]
    costs = StepCosts(ROUND.times)
    run = Simulation(trace, Unmerged(), device=ROUND, limits=LIMITS, costs=costs)
    assert run.run().orchestrator.costs is costs


def test_an_outcome_has_all_requests_and_steps():
    run = run_of(arrival(), arrival(0.001))
    outcome = run.outcome()
    assert [s.finished_s for s in outcome.served] == [r.finished_s for r in run.requests]
    assert sum(step.ms for step in outcome.steps) == pytest.approx(1e3 * run.now_s)


def test_images_are_encoded_once_before_the_first_chunk_and_count_in_the_capacity():
    trace = [Arrival(at_s=0.0, adapter=None, prompt_tokens=150, output_tokens=1, images=3)]
    slow = dataclasses.replace(ROUND, times=dataclasses.replace(ROUND.times, image_ms=20.0))
    [request] = Simulation(trace, Unmerged(), device=slow, limits=LIMITS).run().requests
    assert request.finished_s == pytest.approx(0.010 + 0.010 + 0.015 + 3 * 0.020)
    free_ms, slow_ms = (
        1e3 / capacity(trace, device=device, limits=LIMITS, traits=None) for device in (ROUND, slow)
    )
    assert slow_ms - free_ms == pytest.approx(3 * 20.0)


def test_capacity_without_adapters_is_the_largest():
    trace = make_trace(skewed(8, 0.5), rate=1.0, requests=50)
    sizes = dict(device=Device(), limits=step_limits())
    light = capacity(trace, traits=lambda _: AdapterTraits(pages=1.0), **sizes)
    heavy = capacity(trace, traits=lambda _: AdapterTraits(pages=8.0), **sizes)
    assert heavy < light < capacity(trace, traits=None, **sizes)


def test_a_prompt_never_adds_to_the_capacity():
    times = StepTimes(prompt_token_ms=-1.0, lora_ms=0.0, page_ms=0.0, token_page_ms=0.0)
    trace = make_trace(skewed(2, 0.5), rate=1.0, requests=20)
    sizes = dict(limits=step_limits(), traits=None)
    free = StepTimes(prompt_token_ms=0.0)
    assert capacity(trace, device=Device(times=times), **sizes) == pytest.approx(
        capacity(trace, device=Device(times=free), **sizes)
    )
