"""A trace in simulated time: an engine of one policy on a device that only takes time.

Requests, rows, chunks of prompts and merges between steps are the engine's; key-value pages and
adapter slots do not run out, and a step's tokens are there when it ends. Policies see estimated
times, which start from a guess and follow the device's as in the engine.
"""

import collections
import copy
import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from valora_jax.engine.buckets import MAX_CHUNKS, Buckets, default_step_tokens
from valora_jax.engine.costs import Mode, StepCosts, StepLoad, StepTimes
from valora_jax.engine.orchestrator import Orchestrator
from valora_jax.engine.rounds import (
    Adapter,
    AdapterTraits,
    Decision,
    Policy,
    StepLimits,
    chunks_of,
    plan_step,
)
from valora_jax.replay.arrivals import Arrival
from valora_jax.replay.outcome import Outcome, RanStep, Served

RANK_64 = AdapterTraits(pages=4.0)


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class SimulatedRequest:
    """A request of the trace in the engine; `Servable`.

    Attributes:
      arrival: as it came.
      waiting_since_s: since when no step has served it.
      remaining: tokens before its next one can be sampled.
      output_tokens: that it has.
      first_token_s, finished_s: when; None before.
      longest_wait_s: without being served, from its arrival and from step to step.
      admitted_s: when the first step that served it began.
    """

    arrival: Arrival
    waiting_since_s: float
    remaining: int
    output_tokens: int = 0
    first_token_s: float | None = None
    finished_s: float | None = None
    longest_wait_s: float = 0.0
    admitted_s: float | None = None

    @property
    def adapter(self) -> Adapter | None:
        return self.arrival.adapter

    @property
    def new_images(self) -> int:
        return self.arrival.images if self.admitted_s is None else 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step that ran, for tests and timelines."""

    start_s: float
    ms: float
    decision: Decision
    mode: Mode
    requests: tuple[SimulatedRequest, ...]


class Times(Protocol):
    """What steps take: `StepTimes`, or `LearntTimes`."""

    def of(self, load: StepLoad) -> float:
        """Milliseconds of a step."""
        ...


class LearntTimes:
    """What an engine has learnt of its steps until now."""

    def __init__(self, costs: StepCosts):
        self._costs = copy.deepcopy(costs)  # the engine goes on learning

    def of(self, load: StepLoad) -> float:
        return self._costs.estimate_ms(load)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What the simulated device takes.

    Attributes:
      times: of steps.
      merge_ms: of folding an adapter in.
      noise: standard deviation of a step's time, as a share of it.
    """

    times: Times = dataclasses.field(default_factory=StepTimes)
    merge_ms: float = 10.0
    noise: float = 0.0

    @classmethod
    def learnt(cls, costs: StepCosts) -> "Device":
        """The device that an engine runs on, as it knows it now."""
        return cls(times=LearntTimes(costs), merge_ms=costs.merge_ms)


def step_limits(
    *, max_requests: int = 32, max_tokens_per_step: int | None = None, tokens_per_image: int = 576
) -> StepLimits:
    """Those of an engine on an accelerator with these sizes, by default the usual ones."""
    if max_tokens_per_step is None:
        max_tokens_per_step = default_step_tokens(
            max_requests=max_requests, tokens_per_image=tokens_per_image
        )
    buckets = Buckets(
        max_requests=max_requests,
        max_tokens_per_step=max_tokens_per_step,
        tokens_per_image=tokens_per_image,
        spacing="fine",
    )
    return StepLimits(
        max_requests=max_requests,
        max_tokens_per_step=max_tokens_per_step,
        max_prefill_chunks=MAX_CHUNKS,
        bucket=lambda decodes, prompt: buckets.choose(decodes=decodes, prompt_tokens=prompt),
    )


class Simulation:
    """Runs one trace under one policy, once.

    Attributes:
      requests: of the trace, in order of arrival.
      orchestrator: with its counters.
      now_s: simulated time.
    """

    def __init__(
        self,
        trace: Sequence[Arrival],
        policy: Policy,
        *,
        device: Device | None = None,
        limits: StepLimits | None = None,
        traits: Callable[[Adapter], AdapterTraits] = lambda _: RANK_64,
        costs: StepCosts | None = None,
        seed: int = 0,
    ):
        """Prepares a run.

        Args:
          trace: in any order.
          policy: fresh; it keeps state.
          device: an H100 with LLaVA-1.5-7B by default.
          limits: 32 requests and 1,280 tokens a step by default.
          traits: of each adapter; rank 64 everywhere by default.
          costs: what the policy knows of the device at first, not copied; a guess by default.
          seed: of the device's noise.
        """
        self._device, self._limits = device or Device(), limits or step_limits()
        self._traits = traits
        self._rng = random.Random(seed)
        self.orchestrator = Orchestrator(policy, limits=self._limits, traits=traits, costs=costs)
        self.requests = [
            SimulatedRequest(
                arrival=arrival, waiting_since_s=arrival.at_s, remaining=arrival.prompt_tokens
            )
            for arrival in sorted(trace, key=lambda arrival: arrival.at_s)
        ]
        self.now_s = 0.0
        self._coming = collections.deque(self.requests)
        self._waiting: list[SimulatedRequest] = []
        self._running: list[SimulatedRequest] = []
        self._steps: list[RanStep] = []

    def run(self) -> "Simulation":
        """Runs to the end of the last answer."""
        while self.step() is not None:
            pass
        return self

    def step(self) -> Step | None:
        """Runs one step and what is merged after it; None when every answer is complete."""
        self._arrive()
        if not self._waiting and not self._running:
            return None
        decision = self.orchestrator.decide(self.now_s, self._running, self._waiting)
        plan = plan_step(decision, self._running, self._waiting, limits=self._limits)
        assert plan, "an orchestrator always serves somebody"
        load = self.orchestrator.load_of(chunks_of(plan), decision.folded)
        ms = self._device.times.of(load) * math.exp(self._rng.gauss(0, self._device.noise))
        start_s = self.now_s
        for request, _ in plan:
            waited_s = start_s - request.waiting_since_s
            request.longest_wait_s = max(request.longest_wait_s, waited_s)
            if request.admitted_s is None:
                request.admitted_s = start_s
        self.now_s += ms / 1e3
        self._take(plan)
        self.orchestrator.observe(load, ms)
        self._steps.append(
            RanStep(start_s=start_s, ms=ms, mode=load.mode, prompt_tokens=load.prompt_tokens)
        )
        if decision.merge is not None:
            self._merge(decision.merge)
        return Step(
            start_s=start_s,
            ms=ms,
            decision=decision,
            mode=load.mode,
            requests=tuple(request for request, _ in plan),
        )

    def outcome(self) -> Outcome:
        """What became of the trace so far."""
        return Outcome(
            served=[
                Served(
                    arrival=request.arrival,
                    admitted_s=request.admitted_s,
                    first_token_s=request.first_token_s,
                    finished_s=request.finished_s,
                )
                for request in self.requests
            ],
            steps=self._steps,
            switches=self.orchestrator.switches,
            interrupted=self.orchestrator.interrupted,
        )

    def abort(self, adapter: Adapter) -> None:
        """Takes the requests of an adapter that have come out, as if their users had gone."""
        self._arrive()
        for requests in (self._waiting, self._running):
            requests[:] = [request for request in requests if request.adapter != adapter]

    def _arrive(self) -> None:
        if not self._waiting and not self._running and self._coming:
            self.now_s = max(self.now_s, self._coming[0].arrival.at_s)
        while self._coming and self._coming[0].arrival.at_s <= self.now_s:
            self._waiting.append(self._coming.popleft())

    def _take(self, plan: list[tuple[SimulatedRequest, int]]) -> None:
        running = set(self._running)
        for request, length in plan:
            if request not in running:
                self._waiting.remove(request)
                self._running.append(request)
            request.waiting_since_s = self.now_s
            request.remaining -= length
            if request.remaining == 0:
                self._sample(request)

    def _sample(self, request: SimulatedRequest) -> None:
        request.output_tokens += 1
        if request.first_token_s is None:
            request.first_token_s = self.now_s
        if request.output_tokens == request.arrival.output_tokens:
            request.finished_s = self.now_s
            self._running.remove(request)
        else:
            request.remaining = 1

    def _merge(self, adapter: Adapter) -> None:
        copy = self.orchestrator.copy
        done = copy.fraction if copy.adapter == adapter else 0.0
        total_ms = self._device.merge_ms
        ms = min(self._limits.merge_chunk_ms, (1 - done) * total_ms)
        self.now_s += ms / 1e3
        fraction = done + ms / total_ms
        self.orchestrator.copied(adapter, 1.0 if fraction > 1 - 1e-9 else fraction)
        if self.orchestrator.copy.usable is not None:
            self.orchestrator.observe_merge(total_ms)


def capacity(
    trace: Sequence[Arrival],
    *,
    device: Device,
    limits: StepLimits,
    traits: Callable[[Adapter], AdapterTraits] | None,
) -> float:
    """Requests a second, of the kind that a trace has, that unmerged steps of full rows serve.

    Args:
      trace: its rate does not matter.
      device: what steps take.
      limits: how many rows are full, and how much of a prompt a step computes.
      traits: of adapters; None asks for the capacity without adapters.
    """
    rows, chunk = limits.max_requests, max(limits.max_tokens_per_step - limits.max_requests, 1)
    pages = {
        arrival.adapter: traits(arrival.adapter).pages
        if traits is not None and arrival.adapter is not None
        else 0.0
        for arrival in trace
    }
    counts = collections.Counter(arrival.adapter for arrival in trace)
    share = {adapter: count / len(trace) for adapter, count in counts.items()}

    def step_ms(prompt_tokens: int, prompt_pages: float, *, images: int = 0) -> float:
        """Of full rows that decode beside so much of a prompt."""
        load = StepLoad(
            bucket=limits.bucket(rows, prompt_tokens),
            mode=Mode.UNMERGED,
            decodes=rows,
            prompt_tokens=prompt_tokens,
            images=images,
            pages=sum(pages[a] * (1 - (1 - share[a]) ** rows) for a in counts),
            token_pages=rows * sum(pages[a] * share[a] for a in counts)
            + prompt_tokens * prompt_pages,
        )
        return device.times.of(load)

    decodes_ms = step_ms(0, 0.0)
    prompt_ms = {  # learnt times are noisy, and a prompt is never done in less than no time
        adapter: max(step_ms(chunk, own) - decodes_ms, 0.0) / chunk
        for adapter, own in pages.items()
    }
    image_ms = max(step_ms(chunk, 0.0, images=1) - step_ms(chunk, 0.0), 0.0)
    work_ms = sum(
        arrival.output_tokens * decodes_ms / rows
        + arrival.prompt_tokens * prompt_ms[arrival.adapter]
        + arrival.images * image_ms
        for arrival in trace
    )
    return 1e3 * len(trace) / work_ms
