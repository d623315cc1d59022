"""Replays traces through a real engine, with random prompts, images and adapters.

One engine replays all traces of a sweep, one after the other, and keeps what it has learnt of its
steps. Prompts and pixels are ready before a replay begins: it measures the engine, not what brings
requests to it.
"""

import copy
import dataclasses
import gc
from collections.abc import Sequence

import jax

from pallas_kernels.lora_matmul import PAGE_RANKS
from valora_jax.config import EngineConfig, PolicyName
from valora_jax.engine.core import Job
from valora_jax.engine.events import Event, StepRan
from valora_jax.engine.generation import CheckedPrompt, Prompts
from valora_jax.engine.metrics import EngineMetrics
from valora_jax.engine.policies import make_policy
from valora_jax.engine.rounds import Adapter, AdapterTraits, Copy, Servable
from valora_jax.engine.start import Parts, start
from valora_jax.lora.host_store import NewAdapter
from valora_jax.replay.arrivals import Arrival, at_once, without_adapters
from valora_jax.replay.driver import drive
from valora_jax.replay.outcome import Outcome, RanStep, Served
from valora_jax.replay.random_adapters import adapter_name, random_adapters
from valora_jax.replay.random_model import random_parts
from valora_jax.replay.random_prompts import RandomPrompts
from valora_jax.replay.settings import ReplaySettings
from valora_jax.replay.simulation import Device, Simulation, capacity

# Arrays are views of one block, so that what they seem to take is not taken.
_HOST_ADAPTER_BYTES = 2**50
_MAX_WAITING = 2**20  # an open loop refuses nobody


def live_system(settings: ReplaySettings, *, adapters: int) -> "LiveSystem":
    """Starts the engine that the settings ask for.

    Raises what `engine.start.start` raises.
    """
    config = engine_config(settings, adapters=adapters)
    if settings.model is not None:
        parts = start(settings.model.expanduser(), config, show_progress=True)
    else:
        assert settings.shapes is not None  # `ReplaySettings.check`
        parts = random_parts(settings.shapes, config, show_progress=True)
    return LiveSystem(parts, settings, config, adapters=adapters)


def engine_config(settings: ReplaySettings, *, adapters: int) -> EngineConfig:
    """The engine's settings, with room for so many adapters, or for as many as shall be there."""
    resident = min(settings.resident or adapters, adapters)
    ranks = [settings.ranks[i % len(settings.ranks)] for i in range(adapters)]
    largest = sorted((-(-rank // PAGE_RANKS) for rank in ranks), reverse=True)[:resident]
    return dataclasses.replace(
        settings.engine,
        policy="valora",  # one that takes a merged copy, for the others, too
        max_adapters=resident,
        lora_pages=sum(largest),
        host_adapter_bytes=_HOST_ADAPTER_BYTES,
        max_waiting=_MAX_WAITING,
    )


class LiveSystem:
    """A `System` of a running engine that nobody else uses."""

    def __init__(
        self, parts: Parts, settings: ReplaySettings, config: EngineConfig, *, adapters: int
    ):
        """Registers random adapters.

        Args:
          parts: of an engine of `config`.
          settings: of the adapters.
          config: see `engine_config`.
          adapters: how many.
        """
        self.device = jax.devices()[0].device_kind
        self.image_tokens = parts.spec.tokens_per_image
        core = parts.core
        assert core.adapters is not None  # its config has room for some
        assert core.modes is not None
        self._parts, self._config = parts, config
        self._core, self._adapters, self._modes = core, core.adapters, core.modes
        self._prompts = Prompts(parts, seed=settings.seed)
        self._refs = [
            core.adapters.register(NewAdapter(adapter=adapter)).ref
            for adapter in random_adapters(
                parts.spec.adapter_target,
                number=adapters,
                ranks=settings.ranks,
                targets=settings.targets,
                seed=settings.seed,
            )
        ]
        self._random = RandomPrompts(parts, seed=settings.seed)

    def capacity(self, trace: Sequence[Arrival]) -> float:
        """Computed from what steps take, which some requests offered at once have shown first.

        All adapters that the device holds are there afterwards.
        """
        rows, adapters = self._config.max_requests, len(self._refs)
        self.replay(without_adapters(at_once(trace[: 2 * rows])), "unmerged")
        in_turn = [
            dataclasses.replace(trace[i % len(trace)], at_s=0.0, adapter=i % adapters)
            for i in range(max(rows, adapters))
        ]
        self.replay(in_turn, "unmerged")
        device = Device.learnt(self._modes.orchestrator.costs)
        return capacity(trace, device=device, limits=self._modes.orchestrator.limits, traits=None)

    def replay(self, trace: Sequence[Arrival], policy: PolicyName) -> Outcome:
        """Replays a trace, in order of arrival, with an empty merged copy at first.

        Raises:
          ValueError: a request of the trace does not fit the engine.
        """
        checked = [self._random.make(arrival) for arrival in trace]
        self._modes.orchestrator.set_policy(make_policy(policy, max_wait_s=self._config.max_wait_s))
        self._modes.orchestrator.copy = Copy()
        before = EngineMetrics.of(self._core)
        jobs: list[Job] = []
        events: list[Event] = []
        stop_listening = self._parts.events.listen(events.append)
        gc.collect()  # what preparing left behind is not the engine's to clear up
        try:
            start_s = drive(
                self._core, trace, lambda n: jobs.append(self._add(checked[n], trace[n]))
            )
        finally:
            stop_listening()
        steps = [event for event in events if isinstance(event, StepRan)]
        after = EngineMetrics.of(self._core)
        return Outcome(
            served=_served(trace, jobs, steps, start_s=start_s),
            steps=[
                RanStep(
                    start_s=step.start_s - start_s,
                    ms=step.ms,
                    mode=step.load.mode,
                    prompt_tokens=step.load.prompt_tokens,
                )
                for step in steps
            ],
            switches=after.switches - before.switches,
            interrupted=after.interrupted_merges - before.interrupted_merges,
            refused=after.refused_merges,
            uploads=after.adapter_uploads - before.adapter_uploads,
            preemptions=after.preemptions - before.preemptions,
        )

    def predict(self, trace: Sequence[Arrival], policy: PolicyName) -> Outcome:
        costs = self._modes.orchestrator.costs
        run = Simulation(
            trace,
            make_policy(policy, max_wait_s=self._config.max_wait_s),
            device=Device.learnt(costs),
            limits=self._modes.orchestrator.limits,
            traits=self._traits,
            costs=copy.deepcopy(costs),
        )
        return run.run().outcome()

    def _traits(self, adapter: Adapter) -> AdapterTraits:
        assert isinstance(adapter, int)  # traces number them
        return self._modes.traits(self._refs[adapter])

    def _add(self, checked: CheckedPrompt, arrival: Arrival) -> Job:
        name = None if arrival.adapter is None else adapter_name(arrival.adapter)
        ref = None if name is None else self._adapters.hold(name)
        [job] = self._prompts.make(checked, [ref]).jobs
        self._core.add([job])
        return job


def _served(
    trace: Sequence[Arrival], jobs: Sequence[Job], steps: Sequence[StepRan], *, start_s: float
) -> list[Served]:
    """What became of each request; raises what ended one before its time."""
    admitted_s: dict[Servable, float] = {}
    for step in steps:
        for request in step.requests:
            admitted_s.setdefault(request, step.start_s)
    for job in jobs:
        if job.error is not None:
            raise job.error

    def since(at_s: float | None) -> float | None:
        return None if at_s is None else at_s - start_s

    return [
        Served(
            arrival=arrival,
            admitted_s=since(admitted_s.get(job.request)),
            first_token_s=since(job.first_token_s),
            finished_s=since(job.finished_s),
        )
        for arrival, job in zip(trace, jobs, strict=True)
    ]
