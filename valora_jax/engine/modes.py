"""Carries out what the orchestrator decides: which weights a step runs on, and what is merged.

Merges run between steps, some layers at a time, and requests go on meanwhile. Steps and merges are
timed as they end on the device, without waiting for it.
"""

import collections
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping

from pallas_kernels.lora_matmul import LoraPool
from valora_jax.engine.costs import StepLoad
from valora_jax.engine.events import Events, MergeBegun, MergeInterrupted, MergeWhole, StepRan
from valora_jax.engine.mergeable import PlacedAdapters, Traits
from valora_jax.engine.orchestrator import Orchestrator
from valora_jax.engine.plan import Folded, Plan
from valora_jax.engine.request import Request
from valora_jax.engine.rounds import EVERYBODY_UNMERGED, ChunkLoad, Copy, Decision
from valora_jax.engine.scheduler import Scheduler
from valora_jax.lora.host_store import AdapterRef
from valora_jax.lora.merged_copy import MergedCopy
from valora_jax.lora.mode import Mode
from valora_jax.lora.residency import REPLACED_HEADS
from valora_jax.models.spec import HEAD_SITE

_log = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True, slots=True)
class _Merge:
    """The filling of the copy with one adapter.

    Attributes:
      layers: that are enqueued.
      unread: steps in flight right before which some of them are.
      ms: that these took, of those that were read; None if that cannot be told.
    """

    layers: int = 0
    unread: int = 0
    ms: float | None = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Enqueued:
    """A step in flight.

    Attributes:
      at_s: when the host began to enqueue it.
      after: the merge of which some layers are enqueued between it and the step before.
      compiled: whether the host compiled something for it.
    """

    plan: Plan
    decision: Decision
    load: StepLoad
    at_s: float
    after: _Merge | None
    compiled: bool


class Modes:
    """One engine's modes.

    Attributes:
      orchestrator: decides, and counts.
      traits: of adapters.
      copy: the merged weights; None where nothing is merged.
      tokens: decoder rows by how they ran: on weights with their own adapter in them, on weights
        with another's, or on the base weights.
    """

    def __init__(
        self,
        orchestrator: Orchestrator,
        traits: Traits,
        adapters: PlacedAdapters,
        copy: MergedCopy | None,
        *,
        pools: Callable[[], Mapping[str, LoraPool]],
        merge_chunk_ms: float,
        events: Events,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Args:
        orchestrator: with an empty copy.
        traits: that it asks, too.
        adapters: where versions are.
        copy: to fill.
        pools: the device's rank pages, as they are now.
        merge_chunk_ms: device time that may pass between two steps.
        events: hear of steps and merges.
        clock: of the requests' times, in seconds.
        """
        self.orchestrator, self.traits, self.copy = orchestrator, traits, copy
        self.tokens: collections.Counter[Mode] = collections.Counter()
        self._adapters, self._pools, self._clock = adapters, pools, clock
        self._merge_chunk_ms, self._events = merge_chunk_ms, events
        self._merge = _Merge()
        self._after: _Merge | None = None  # of the next step
        self._in_flight: collections.deque[_Enqueued] = collections.deque()
        self._free_s, self._free_on_time = -math.inf, True  # when the last step ended

    def plan(self, scheduler: Scheduler) -> tuple[Plan | None, Decision]:
        """Plans a step for those whom the orchestrator wants to serve."""
        running = [request for request in scheduler.running if not request.outputs_planned]
        decision = self.orchestrator.decide(self._clock(), running, scheduler.waiting)
        plan = scheduler.plan(decision.serves)
        if decision.only is not None and plan is None:
            # Whom it wants to serve lack something that the others may hold.
            decision = dataclasses.replace(EVERYBODY_UNMERGED, merge=decision.merge)
            plan = scheduler.plan()
        if decision.folded is not None and plan is not None and self._unmergeable_rides(plan):
            # The scheduler may admit others than the orchestrator foresaw.
            decision = dataclasses.replace(decision, folded=None)
        return plan, decision

    def _unmergeable_rides(self, plan: Plan) -> bool:
        """Whether some row's adapter was refused, or not measured yet and may be: it would drown in
        the rounding of merged weights."""
        refs = {chunk.request.adapter for chunk in plan.chunks}
        return any(ref is not None and not self.traits(ref).mergeable for ref in refs)

    def fold(self, decision: Decision) -> Folded | None:
        """What is in the weights that the step runs on; None for the base weights."""
        ref = decision.folded
        if not isinstance(ref, AdapterRef):
            return None
        if (slot := self._adapters.slot_of(ref)) is None:
            return None  # it was evicted, and cannot be subtracted; none of the rows brings it
        pages = self._adapters.pages(ref)
        return Folded(slot=slot, changes_head=HEAD_SITE in pages or REPLACED_HEADS in pages)

    def enqueued(
        self,
        plan: Plan,
        decision: Decision,
        *,
        folded: Folded | None,
        encoded: Mapping[Request, int],
        began_s: float,
        compiled: bool,
    ) -> None:
        """Takes note of a step that was enqueued, and enqueues what is to be merged after it.

        Args:
          plan, decision: of the step.
          folded: what is in its weights.
          encoded: images that were encoded for it, by request.
          began_s: when the host began to enqueue it, with these images.
          compiled: whether something was compiled for it.
        """
        adapter = decision.folded if folded is not None else None
        chunks = [
            ChunkLoad(c.request.adapter, c.length, encoded.get(c.request, 0)) for c in plan.chunks
        ]
        for chunk in chunks:
            if adapter is None:
                self.tokens[Mode.UNMERGED] += chunk.tokens
            else:
                mode = Mode.MERGED if chunk.adapter == adapter else Mode.MIXTURE
                self.tokens[mode] += chunk.tokens
        self._in_flight.append(
            _Enqueued(
                plan=plan,
                decision=decision,
                load=self.orchestrator.load_of(chunks, adapter),
                at_s=began_s,
                after=self._after,
                compiled=compiled,
            )
        )
        self._after = None
        if isinstance(decision.merge, AdapterRef):
            self._merge_some(decision.merge)

    def ended(self, *, on_time: bool) -> None:
        """Takes note that the oldest step has just been read.

        Args:
          on_time: the host waited for it, so that it ended now.
        """
        now_s, step = self._clock(), self._in_flight.popleft()
        start_s = max(step.at_s, self._free_s)
        ms = 1e3 * (now_s - start_s)
        waited = step.at_s < self._free_s  # for the step before, so that it began when that ended
        exact = on_time and not step.compiled and ms > 0 and (self._free_on_time or not waited)
        if step.after is not None:
            self._time_merge(step, ms=ms if exact and waited else None)
        if step.after is None and exact:
            self.orchestrator.observe(step.load, ms)
        else:
            self.orchestrator.count(step.load, ms)
        self._free_s, self._free_on_time = now_s, on_time
        if self._events.heard:
            self._events.send(
                StepRan(
                    start_s=start_s,
                    ms=ms,
                    load=step.load,
                    decision=step.decision,
                    requests=tuple(chunk.request for chunk in step.plan.chunks),
                )
            )

    def forget(self, ref: AdapterRef) -> None:
        """Drops a version that no request will bring again."""
        before = self.orchestrator.copy
        self.orchestrator.forget(ref)
        self.traits.forget(ref)
        self._tell_of_copy(before)

    def warm_up(self) -> None:
        """Compiles what fills the copy, and measures it; before any adapter is placed."""
        if self.copy is not None:
            self.orchestrator.costs.merge_ms = self.copy.measure_ms(self._pools())
            self.traits.warm_up()

    def _merge_some(self, ref: AdapterRef) -> None:
        """Enqueues some more layers of a version's copy, or begins it."""
        slot = self._adapters.slot_of(ref)
        if self.copy is None or slot is None or self.orchestrator.copy.usable == ref:
            return  # it is still to be placed, was evicted, or is folded in
        before = self.orchestrator.copy
        if before.adapter != ref:
            self._merge = _Merge()
        merge, layers = self._merge, self.copy.layers
        some = int(layers * self._merge_chunk_ms / self.orchestrator.costs.merge_ms)
        stop = min(merge.layers + max(1, some), layers)
        for nth in range(merge.layers, stop):
            self.copy.fill(nth, self._pools(), slot=slot)
        merge.layers = stop
        self._after = merge
        merge.unread += 1
        self.orchestrator.copied(ref, stop / layers)
        self._tell_of_copy(before)

    def _tell_of_copy(self, before: Copy) -> None:
        """Tells what has become of the copy."""
        now = self.orchestrator.copy
        if before.adapter != now.adapter:
            if isinstance(before.adapter, AdapterRef):
                self._tell_of_loss(before.adapter, before)
            if isinstance(now.adapter, AdapterRef):
                self._events.send(MergeBegun(adapter=now.adapter))
        if isinstance(now.usable, AdapterRef) and now.usable != before.usable:
            self._events.send(MergeWhole(adapter=now.usable))

    def _tell_of_loss(self, ref: AdapterRef, before: Copy) -> None:
        """Tells that a version has lost the copy, which was like this, to another one or as it
        went."""
        gone = self.orchestrator.copy.adapter is None
        if before.begun is not None:
            self._events.send(MergeInterrupted(adapter=ref))
            _log.info(
                "the merge of adapter %r version %d was interrupted at %.0f%%: %s",
                ref.name,
                ref.version,
                100 * before.fraction,
                "it was unloaded, and the copy is dropped" if gone else "another takes the copy",
            )
        elif gone:
            _log.info(
                "adapter %r version %d was unloaded while folded in: its copy is dropped, and "
                "steps run on the base weights",
                ref.name,
                ref.version,
            )

    def _time_merge(self, step: _Enqueued, *, ms: float | None) -> None:
        """Takes what a merge's layers and the step after them took; None if that is not known."""
        merge, costs = step.after, self.orchestrator.costs
        assert merge is not None
        merge.unread -= 1
        if ms is None or merge.ms is None:
            merge.ms = None
            return
        merge.ms += max(0.0, ms - costs.estimate_ms(step.load))
        assert self.copy is not None
        if merge.layers == self.copy.layers and merge.unread == 0:
            self.orchestrator.observe_merge(merge.ms)
