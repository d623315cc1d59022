"""The policy in simulated time: what it keeps, whatever comes. `tests/replay` compares policies."""

import dataclasses
import itertools
import types

from valora_jax.engine import valora_policy
from valora_jax.engine.costs import StepCosts, StepTimes
from valora_jax.engine.policies import Unmerged
from valora_jax.engine.rounds import AdapterTraits, ChunkLoad
from valora_jax.engine.valora_policy import Valora
from valora_jax.lora.mode import Mode
from valora_jax.replay.arrivals import Arrival, make_trace, skewed
from valora_jax.replay.simulation import Device, Simulation, Step, step_limits

LIMITS = step_limits(max_requests=8, max_tokens_per_step=256, tokens_per_image=64)
# A LoRA that nearly doubles a step, as of dLoRA's measurements (15 ms merged, 27 ms unmerged).
HEAVY = Device(times=StepTimes(step_ms=14.0, decode_ms=0.05, lora_ms=12.0))
WEAK = 1


def traits(adapter) -> AdapterTraits:
    return AdapterTraits(pages=4.0, mergeable=adapter != WEAK)


def mergeable(_) -> AdapterTraits:
    return AdapterTraits(pages=4.0)


def arrivals(*rows: tuple[float, int | None, int]) -> list[Arrival]:
    """Requests of one prompt token: when, whose, how long an answer."""
    return [
        Arrival(at_s=at_s, adapter=adapter, prompt_tokens=1, output_tokens=output)
        for at_s, adapter, output in rows
    ]


def simulation(trace, *, device=HEAVY, traits=mergeable, max_wait_s=1.0, costs=None) -> Simulation:
    policy = Valora(max_wait_s=max_wait_s)
    return Simulation(trace, policy, device=device, limits=LIMITS, traits=traits, costs=costs)


def steps_of(run: Simulation) -> list[Step]:
    return list(iter(run.step, None))


def longest_wait_s(run: Simulation) -> float:
    return max(request.longest_wait_s for request in run.requests)


def test_one_request_of_many_is_served_every_few_steps_where_lora_is_heavy():
    run = simulation(arrivals(*[(0.0, 0, 300)] * 7, (1.0, 2, 20)))
    late = [step for step in steps_of(run) if step.start_s > 1.0]
    modes = [step.mode for step in late if len(step.requests) > 1]
    assert len(modes) - modes.count(Mode.MERGED) == 20
    assert modes.count(Mode.MERGED) > 20


def test_theta_shortens_the_wait_that_would_pay():
    heavier = dataclasses.replace(HEAVY, times=dataclasses.replace(HEAVY.times, lora_ms=400.0))
    trace = arrivals(*[(0.0, 0, 1000)] * 7, (6.0, 2, 5))
    waits_s = []
    for theta_s in (0.45, 0.5, 10.0):
        run = simulation(trace, device=heavier, max_wait_s=theta_s)
        steps_of(run)
        waits_s.append(run.requests[-1].longest_wait_s)
    assert 0 < waits_s[0] < waits_s[1] < waits_s[2] < 0.3


def test_decodes_of_others_wait_for_steps_without_prompts_where_these_pay_more_for_lora():
    trace = arrivals(*[(0.0, 0, 600)] * 5, (1.0, 2, 100))
    trace += [
        Arrival(at_s=1.0 + 0.1 * i, adapter=0, prompt_tokens=100, output_tokens=2)
        for i in range(1, 5)
    ]
    device = Device(times=StepTimes(prompt_lora_ms=5.0))
    run = simulation(trace, device=device)
    late = [step for step in steps_of(run) if 1.05 < step.start_s < run.requests[5].finished_s]
    held = [step for step in late if 2 not in {r.adapter for r in step.requests}]
    assert len(held) == 4
    assert all(step.mode is Mode.MERGED for step in held)


def test_of_several_who_decode_later_one_alone_pays_for_lora_once_more():
    def estimate_ms(chunks, folded):  # a step 10 ms, a row 1 and LoRA 5
        return 10 + len(chunks) + 5 * any(chunk.adapter != folded for chunk in chunks)

    def later_ms(*adapters):
        chunks = [ChunkLoad(0, 100), *(ChunkLoad(adapter, 1) for adapter in adapters)]
        round = types.SimpleNamespace(estimate_ms=estimate_ms)
        return valora_policy._decode_later_ms(round, chunks, frozenset([0]), 0)

    assert later_ms(0, 0, 0, 0, 2) == 5 + 1 + 21 / 6  # LoRA, its row, and it ends a step later
    assert later_ms(0, 0, 0, 2, 3) == 2 + 2 * 21 / 6


def test_nobody_is_held_back_where_lora_is_light():
    run = simulation(arrivals(*[(0.0, 0, 300)] * 6, *[(1.0, 2, 50)] * 2), device=Device())
    assert all(step.decision.only is None for step in steps_of(run))
    assert run.orchestrator.seconds[Mode.MERGED] > 0


def test_nobody_is_held_back_while_rows_are_short():
    run = simulation(arrivals(*[(0.0, 0, 300)] * 7, (1.0, 2, 100), *[(1.5, 0, 300)] * 4))
    steps = steps_of(run)
    short = [s for s in steps if 1.6 < s.start_s < run.requests[7].finished_s]
    assert short
    assert all(step.decision.only is None for step in short)
    assert any(step.decision.only is not None for step in steps if 1.0 < step.start_s < 1.5)


def test_who_decodes_later_while_rows_are_short_does_so_in_the_next_step():
    trace = arrivals(*[(0.0, 0, 600)] * 5, (1.0, 2, 100))
    trace += [Arrival(at_s=1.1, adapter=0, prompt_tokens=100, output_tokens=2)] * 60
    run = simulation(trace, device=Device(times=StepTimes(prompt_lora_ms=5.0)))
    steps = [s for s in steps_of(run) if 1.1 < s.start_s < run.requests[5].finished_s]
    held = [2 not in {request.adapter for request in step.requests} for step in steps]
    assert sum(held) > 10
    assert not any(one and other for one, other in itertools.pairwise(held))


def test_who_decodes_later_does_so_in_the_next_step_however_many_have_prompts():
    trace = arrivals(*[(0.0, 0, 600)] * 5, (1.0, 2, 100))
    trace += [Arrival(at_s=1.2, adapter=3, prompt_tokens=100, output_tokens=2)]  # waits for room
    trace.append(Arrival(at_s=1.1, adapter=0, prompt_tokens=20_000, output_tokens=2))
    run = simulation(trace, device=Device(times=StepTimes(prompt_lora_ms=5.0)))
    steps = [s for s in steps_of(run) if 1.1 < s.start_s < run.requests[5].finished_s]
    held = [2 not in {request.adapter for request in step.requests} for step in steps]
    assert sum(held) > 0.3 * len(held)
    assert not any(one and other for one, other in itertools.pairwise(held))


def test_two_alike_do_not_flap():
    weights = skewed(2, 0.5)
    trace = make_trace(weights, rate=10.0, requests=300)
    run = Simulation(trace, Valora(max_wait_s=0.5), device=Device(noise=0.03)).run()
    assert run.now_s > 20
    assert run.orchestrator.switches <= 4


def test_a_new_favourite_takes_the_copy_over_once():
    first = make_trace(skewed(4, 0.9), rate=10.0, requests=200)
    swap = {0: 1, 1: 0}
    later = [
        dataclasses.replace(a, at_s=a.at_s + 20.0, adapter=swap.get(a.adapter, a.adapter))
        for a in make_trace(skewed(4, 0.9), rate=10.0, requests=200, seed=1)
    ]
    run = Simulation([*first, *later], Valora(max_wait_s=0.5)).run()
    assert run.orchestrator.copy.usable == 1
    assert run.orchestrator.switches == 2


def test_merges_cost_less_than_they_save_when_the_favourite_changes_all_the_time():
    blocks = [(0.6 * i, i % 3) for i in range(40)]
    trace = arrivals(*[(at_s, adapter, 60) for at_s, adapter in blocks for _ in range(4)])
    run = simulation(trace, device=Device())
    unmerged = Simulation(trace, Unmerged(), device=Device(), limits=LIMITS)
    busy_s = [sum(s.ms for s in steps_of(r)) / 1e3 for r in (run, unmerged)]
    assert busy_s[0] + 0.01 * run.orchestrator.switches <= busy_s[1]


def test_a_base_row_does_not_keep_the_first_merge_from_beginning():
    known = StepCosts(HEAVY.times)  # of steps that all have LoRA nobody could tell what it takes
    run = simulation(arrivals(*[(0.0, 0, 300)] * 7, (0.0, None, 300)), costs=known)
    steps_of(run)
    assert run.orchestrator.copy.usable == 0
    assert run.orchestrator.seconds[Mode.MERGED] > 0


def interrupted_merge(*later: tuple[float, int | None, int]) -> Simulation:
    """A run whose requests of adapter 0 left while it was being folded in."""
    run = simulation(arrivals(*[(0.0, 0, 300)] * 4, *later), device=Device())
    while run.orchestrator.copy.adapter is None:
        run.step()
    run.abort(0)
    assert run.orchestrator.copy.usable is None
    return run


def test_a_merge_stops_when_its_requests_are_gone():
    run = interrupted_merge((1.0, 2, 2))
    fraction = run.orchestrator.copy.fraction
    assert {(step.mode, step.decision.merge) for step in steps_of(run)} == {(Mode.UNMERGED, None)}
    assert run.orchestrator.copy.fraction == fraction


def test_an_interrupted_merge_goes_on_where_it_stopped():
    run = interrupted_merge((1.0, 0, 20))
    chunks_left = round((1 - run.orchestrator.copy.fraction) * 10 / LIMITS.merge_chunk_ms)
    steps = steps_of(run)
    assert sum(step.decision.merge == 0 for step in steps) == chunks_left
    assert steps[-1].mode is Mode.MERGED
    assert (run.orchestrator.switches, run.orchestrator.interrupted) == (1, 0)


def test_another_adapter_may_take_over_an_interrupted_merge():
    run = interrupted_merge(*[(1.0, 2, 200)] * 2)
    steps_of(run)
    assert run.orchestrator.copy.usable == 2
    assert (run.orchestrator.switches, run.orchestrator.interrupted) == (2, 1)


def test_an_adapter_that_is_unloaded_while_merged_is_not_used_again():
    run = simulation(arrivals(*[(0.0, 0, 300)] * 4, (1.0, 2, 20), (1.0, 3, 20)), device=Device())
    while run.orchestrator.copy.usable is None:
        run.step()
    assert run.orchestrator.copy.usable == 0
    run.abort(0)
    run.orchestrator.forget(0)
    steps = steps_of(run)
    assert {step.mode for step in steps} == {Mode.UNMERGED}
    assert all(step.decision.merge != 0 for step in steps)


def test_a_weak_adapter_is_never_folded_in():
    run = simulation(arrivals(*[(0.0, WEAK, 200)] * 8), traits=traits)
    assert all(step.mode is Mode.UNMERGED for step in steps_of(run))
    assert run.orchestrator.switches == 0


def test_a_weak_adapter_waits_for_unmerged_steps_beside_a_merged_one():
    run = simulation(arrivals(*[(0.0, 0, 300)] * 7, (1.0, WEAK, 20)), traits=traits)
    late = [step for step in steps_of(run) if step.start_s > 1.0]
    with_weak = [step for step in late if WEAK in {r.adapter for r in step.requests}]
    assert len(with_weak) == 20
    assert {step.mode for step in with_weak} == {Mode.UNMERGED}
    assert any(step.mode is Mode.MERGED for step in late)


def test_a_clock_may_start_anywhere():
    trace = arrivals(*[(1e9, 0, 50)] * 4)
    run = simulation(trace)
    steps_of(run)
    assert run.orchestrator.copy.usable == 0
