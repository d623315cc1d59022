import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from tests.engine.asking import Asking
from valora_jax.engine.costs import StepCosts, StepTimes
from valora_jax.engine.kv_blocks import KVBlocks
from valora_jax.engine.request import Request
from valora_jax.engine.rounds import (
    EVERYBODY_UNMERGED,
    AdapterTraits,
    ChunkLoad,
    Copy,
    Decision,
    Round,
    StepLimits,
    load_of,
    plan_step,
)
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.engine.scheduler import Scheduler
from valora_jax.lora.mode import Mode

PAGES = {"cars": 4.0, "planes": 1.0}
LIMITS = StepLimits(
    max_requests=4, max_tokens_per_step=16, max_prefill_chunks=2, bucket=lambda *sizes: sizes
)


def load(chunks, folded=None):
    return load_of(
        itertools.starmap(ChunkLoad, chunks),
        folded,
        bucket=LIMITS.bucket,
        traits=lambda adapter: AdapterTraits(pages=PAGES[adapter]),
    )


def cost_of(step):
    return (step.mode, step.pages, step.token_pages)


def test_images_of_newcomers_are_in_the_step_that_admits_them():
    round = Round(
        0.0,
        [Asking("cars", 1), Asking("cars", 4)],
        [Asking("planes", 3, new_images=2), Asking("planes", 3, new_images=2)],
        copy=Copy(),
        costs=StepCosts(),
        limits=LIMITS,  # of two prompts a step
        traits=lambda adapter: AdapterTraits(pages=PAGES[adapter]),
    )
    chunks = round.chunks(EVERYBODY_UNMERGED)
    assert chunks == [("cars", 1, 0), ("cars", 4, 0), ("planes", 3, 2)]
    bare = [chunk._replace(images=0) for chunk in chunks]
    images_ms = round.estimate_ms(chunks, None) - round.estimate_ms(bare, None)
    assert images_ms == pytest.approx(2 * StepTimes().image_ms)


CHUNKS = [("cars", 1), ("cars", 1), ("planes", 1), (None, 1), ("cars", 10)]


def test_an_unmerged_step_reads_each_adapter_once_and_the_base_model_pays_nothing():
    step = load(CHUNKS)
    assert (step.bucket, step.decodes, step.prompt_tokens) == ((4, 10), 4, 10)
    assert cost_of(step) == (Mode.UNMERGED, 4 + 1, 12 * 4 + 1 * 1)


def test_in_a_mixture_others_add_their_own_and_subtract_what_is_folded():
    assert cost_of(load(CHUNKS, "cars")) == (Mode.MIXTURE, 1 + 4, 1 * 1 + 2 * 4)


def test_in_a_mixture_the_base_model_subtracts_what_is_folded():
    assert cost_of(load([(None, 1), ("cars", 1)], "cars")) == (Mode.MIXTURE, 4, 4)


def test_a_merged_step_pays_nothing():
    assert cost_of(load([("cars", 1), ("cars", 7)], "cars")) == (Mode.MERGED, 0, 0)


def test_a_planned_step_skips_who_is_held_back():
    running = [Asking("cars", 1), Asking("planes", 1)]
    waiting = [Asking("planes", 3), Asking("cars", 3)]
    decision = Decision(folded="cars", only=frozenset(["cars"]))
    plan = plan_step(decision, running, waiting, limits=LIMITS)
    assert plan == [(running[0], 1), (waiting[1], 3)]


@hypothesis.settings(max_examples=150)
@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=12)
)
def test_a_step_is_planned_as_the_scheduler_plans_it(sizes):
    scheduler = Scheduler(
        KVBlocks(num_pages=1000, page_tokens=4, enable_prefix_cache=False),
        max_tokens_per_step=LIMITS.max_tokens_per_step,
        max_requests=LIMITS.max_requests,
        max_prefill_chunks=LIMITS.max_prefill_chunks,
        max_waiting=100,
        max_request_tokens=1000,
    )
    for i, (prompt, output) in enumerate(sizes):
        params = SamplingParams(max_tokens=output)
        scheduler.add(Request(id=str(i), prompt_token_ids=[1] * prompt, params=params))
    while scheduler.has_work:
        expected = plan_step(Decision(), scheduler.running, scheduler.waiting, limits=LIMITS)
        plan = scheduler.plan()
        assert plan is not None
        chunks = plan.decodes + plan.prefills
        assert {r.id: n for r, n in expected} == {c.request.id: c.length for c in chunks}
        for chunk in chunks:
            if chunk.samples:
                scheduler.append_token(chunk.request, 7)
                if chunk.request.outputs_planned:
                    scheduler.finish(chunk.request, "length")
