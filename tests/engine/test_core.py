"""The loop on a simulated device: how many steps are in flight, and what that changes: no token."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from tests.engine.engines import GOLDENS
from tests.engine.simulated_device import END_TOKEN, SimulatedDevice, answer_alone
from valora_jax.engine.answer import Answer
from valora_jax.engine.core import EngineCore, Job
from valora_jax.engine.image_cache import ImageCache
from valora_jax.engine.kv_blocks import KVBlocks
from valora_jax.engine.metrics import EngineMetrics
from valora_jax.engine.plan import Folded, Plan
from valora_jax.engine.request import Request
from valora_jax.engine.runner import InFlight
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.engine.scheduler import Scheduler
from valora_jax.media.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(GOLDENS / "checkpoints" / "llava15-tiny")
PAGE = 4
# In the proportion of an H100 and LLaVA-1.5-7B.
HOST_MS, PROMPT_HOST_MS, STEP_MS = 1.0, 13.0, 6.0


@dataclasses.dataclass
class Later:
    """Tokens of a step, once the device is done with it."""

    runner: "TimedRunner"
    done_ms: float
    token_S: np.ndarray

    def is_ready(self) -> bool:
        return self.runner.now_ms >= self.done_ms

    def to_numpy(self) -> "Later":
        self.runner.now_ms = max(self.runner.now_ms, self.done_ms)
        self.runner.unread -= 1
        return self


@dataclasses.dataclass
class TimedRunner:
    """Steps in simulated time: enqueueing keeps the host busy, computing the device."""

    device: SimulatedDevice
    traces: int = 0
    steps: int = 0
    unread: int = 0
    now_ms: float = 0.0
    done_ms: float = 0.0  # when the device has computed all that is enqueued
    idle_ms: float = 0.0  # of the device, between steps

    def encode(self, images: list) -> None:
        assert images == []

    def execute(self, plan: Plan, folded: Folded | None) -> InFlight:
        assert folded is None
        self.now_ms += PROMPT_HOST_MS if plan.prefills else HOST_MS
        if self.steps:
            self.idle_ms += max(0.0, self.now_ms - self.done_ms)
        self.done_ms = max(self.now_ms, self.done_ms) + STEP_MS
        self.steps += 1
        self.unread += 1
        self.device.run(plan)
        sampled = self.device.unread.pop()
        return InFlight(
            plan=plan,
            requests=[request for request, _ in sampled],
            sampled=Later(self, self.done_ms, np.array([token for _, token in sampled])),
            scores=None,
            classes={},
        )


class Loop:
    """A core, its device and what goes through them."""

    def __init__(self, *, steps_ahead: int, pages: int = 100, max_requests: int = 4):
        self.blocks = KVBlocks(num_pages=pages + 1, page_tokens=PAGE)
        self.scheduler = Scheduler(
            self.blocks,
            max_tokens_per_step=8,
            max_requests=max_requests,
            max_prefill_chunks=2,
            max_waiting=100,
            max_request_tokens=200,
        )
        self.runner = TimedRunner(SimulatedDevice(self.scheduler, PAGE))
        images = ImageCache(slots=1, changes_vision=lambda ref: False)
        self.core = EngineCore(
            self.runner,
            self.scheduler,
            images,
            None,
            tokenizer=TOKENIZER,
            steps_ahead=steps_ahead,
        )

    def add(self, prompt: list[int], max_tokens: int, *, ignore_eos: bool = True) -> Job:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
        request = Request(id="r", prompt_token_ids=prompt, params=params)
        answer = Answer(
            params,
            index=0,
            tokenizer=TOKENIZER,
            end_tokens=[END_TOKEN],
            limit=min(max_tokens, self.scheduler.max_request_tokens - len(prompt)),
        )
        job = Job(request=request, pixels=[], answer=answer)
        self.core.add([job])
        return job

    def finish(self) -> None:
        while self.core.has_work:
            self.core.step()
        self.blocks.check([])
        assert self.blocks.free_pages == self.blocks.usable_pages
        assert (self.runner.unread, self.core._jobs) == (0, {})


def test_without_adapters_nothing_is_counted_of_them():
    loop = Loop(steps_ahead=1)
    job = loop.add([1, 2, 3], 4)
    loop.finish()
    metrics = EngineMetrics.of(loop.core)
    assert metrics.finished[job.answer.finish_reason] == 1
    assert set(metrics.mode_seconds.values()) == set(metrics.mode_tokens.values()) == {0}
    assert (metrics.switches, metrics.merge_ms, metrics.folded) == (0, None, None)
    assert (metrics.resident, metrics.pinned, metrics.adapter_pages) == ((), (), {})


def test_decodes_run_as_far_ahead_as_they_may_and_never_past_the_limit():
    for steps_ahead in (1, 2, 4):
        loop = Loop(steps_ahead=steps_ahead)
        job = loop.add([1, 2, 3], 20)
        unread = []
        while not job.finished:
            loop.core.step()
            unread.append(loop.runner.unread)
        assert max(unread) == steps_ahead
        assert unread.count(steps_ahead) == 21 - steps_ahead
        assert loop.runner.steps == 20
        loop.finish()


def test_who_comes_waits_for_what_is_enqueued_and_for_no_more():
    loop = Loop(steps_ahead=4)
    loop.add([1, 2, 3], 60)
    while loop.runner.steps < 8:
        loop.core.step()
    enqueued = loop.runner.steps
    newcomer = loop.add([4] * 20, 5)
    unread = []
    while not newcomer.request.pending:
        loop.core.step()
        unread.append(loop.runner.unread)
    # The first of three chunks of its prompt right behind what is enqueued, the others one by one.
    assert unread == [4, 3, 2, 1, 1, 1]
    assert loop.runner.steps == enqueued + 3
    loop.core.step()
    assert loop.runner.unread == 2
    loop.finish()


@pytest.mark.parametrize(("steps_ahead", "idle_ms"), [(1, 7.0), (2, 1.0), (3, 0.0)])
def test_a_prompt_is_enqueued_while_the_decodes_before_it_run(steps_ahead, idle_ms):
    """It takes the host 13 ms, and each decode the device 6 ms."""
    loop = Loop(steps_ahead=steps_ahead)
    loop.add([1, 2, 3], 60)
    for _ in range(20):
        loop.core.step()
    loop.add([4, 5, 6], 5)
    loop.finish()
    assert loop.runner.idle_ms == idle_ms


def test_as_long_as_somebody_waits_for_a_row_one_step_is_in_flight():
    loop = Loop(steps_ahead=4, max_requests=1)
    first, second = loop.add([1, 2, 3], 10), loop.add([4, 5, 6], 10)
    while not first.finished:
        loop.core.step()
        assert loop.runner.unread <= 1
    deepest = 0
    while not second.finished:
        loop.core.step()
        deepest = max(deepest, loop.runner.unread)
    assert deepest == 4
    loop.finish()


@pytest.mark.parametrize("steps_ahead", [1, 4])
def test_pages_are_taken_from_nobody_for_a_step_further_ahead(steps_ahead):
    """The second needs its fourth page when the first has ended, but four steps later is read."""
    loop = Loop(steps_ahead=steps_ahead, pages=5)
    loop.add([1, 2, 3], 6)
    loop.add([3, 2, 1, 3, 2, 1], 10)
    loop.finish()
    assert loop.scheduler.preemptions == 0


TRAFFIC = st.lists(
    st.tuples(
        st.lists(st.integers(1, 3), min_size=1, max_size=14),
        st.integers(1, 14),  # max_tokens
        st.integers(0, 6),  # steps until the next one comes
        st.one_of(st.none(), st.none(), st.integers(0, 12)),  # steps until it is aborted
    ),
    min_size=1,
    max_size=10,
)


def run(traffic, *, steps_ahead: int) -> list[Job]:
    """Lets requests come and be aborted; the pool holds little more than one of them."""
    loop, jobs, aborts = Loop(steps_ahead=steps_ahead, pages=8), [], []
    for prompt, max_tokens, pause, abort in traffic:
        jobs.append(loop.add(prompt, max_tokens, ignore_eos=False))
        aborts.append((jobs[-1], abort))
        for _ in range(pause):
            aborts = [(job, n if n is None else n - 1) for job, n in aborts]
            for job, n in aborts:
                if n is not None and n < 0:
                    loop.core.abort(job)
            loop.core.step()
            loop.blocks.check(loop.scheduler.running)
            assert loop.runner.unread <= steps_ahead
    loop.finish()
    return jobs


@hypothesis.settings(max_examples=300)
@hypothesis.given(TRAFFIC, st.integers(2, 6))
def test_no_answer_depends_on_how_many_steps_are_in_flight(traffic, steps_ahead):
    for one, more in zip(
        run(traffic, steps_ahead=1), run(traffic, steps_ahead=steps_ahead), strict=True
    ):
        alone = answer_alone(one.request)
        for job in (one, more):
            output, request = job.answer.output(), job.request
            tokens = list(output.token_ids)
            assert (request.pending, request.pages, request.row) == (0, [], None)
            assert tokens == request.output_token_ids == alone[: len(tokens)]
            if output.finish_reason != "abort":
                assert tokens == alone
                ended = "stop" if alone[-1] == END_TOKEN else "length"
                assert output.finish_reason == ended


@pytest.mark.parametrize(("steps_ahead", "idle_ms"), [(1, 10.0), (2, 4.0), (3, 0.0), (4, 0.0)])
def test_the_device_computes_while_the_host_pauses(steps_ahead, idle_ms):
    """A consumer that takes 15 ms, once; the device has a step of 6 ms for each in flight."""
    loop = Loop(steps_ahead=steps_ahead)
    loop.add([1, 2, 3], 100)
    for _ in range(20):
        loop.core.step()
    assert loop.runner.idle_ms == 0
    loop.runner.now_ms += 15
    loop.finish()
    assert loop.runner.idle_ms == idle_ms
