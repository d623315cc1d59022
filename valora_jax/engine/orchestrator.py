"""Decides before each step how it uses the adapters, and whose requests it may serve.

The merged copy of the weights is filled in chunks between steps and useless until it is whole;
leaving it costs nothing. `rounds` has the terms, `policies` the choices.

The engine calls, for each step:

    decision = orchestrator.decide(now_s, scheduler.running, scheduler.waiting)
    plan = scheduler.plan(decision.serves)
    load = orchestrator.load_of(chunks, decision.folded)    # of the plan
    ...                                    # two branches a row if `decision.folded` is not None
    if decision.merge is not None:
        ...                                # enqueue the next chunk of that adapter's copy
        orchestrator.copied(decision.merge, fraction)
    orchestrator.observe(load, ms)         # when the step has ended; `observe_merge` likewise

and `forget` when a version of an adapter is gone. Requests are read, never changed. Nothing here
knows of key-value pages or gates: a step may serve fewer than a decision allows. Who is held back
no longer than theta waits, on top, for the steps that are in flight already. `modes` is who calls.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence

from valora_jax.engine.costs import StepCosts, StepLoad
from valora_jax.engine.rounds import (
    EVERYBODY_UNMERGED,
    Adapter,
    AdapterTraits,
    ChunkLoad,
    Copy,
    Decision,
    Policy,
    Round,
    Servable,
    StepLimits,
    load_of,
)
from valora_jax.lora.mode import Mode


class Orchestrator:
    """Asks the policy, keeps the state of the copy, and counts.

    Attributes:
      limits: the scheduler's.
      costs: estimates of steps and merges.
      copy: what is folded, or being folded.
      switches: merges begun.
      interrupted: merges that another one replaced before they were whole, or whose adapter went.
      seconds: of steps by mode.
      mode_changes: steps that ran in another mode than the one before.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        limits: StepLimits,
        traits: Callable[[Adapter], AdapterTraits],
        costs: StepCosts | None = None,
    ):
        """Starts with an empty copy.

        Args:
          policy: chooses.
          limits: the scheduler's.
          traits: of any adapter that a request brings.
          costs: a first guess by default.
        """
        self.costs = costs or StepCosts()
        self.copy = Copy()
        self.switches = self.interrupted = self.mode_changes = 0
        self.seconds = dict.fromkeys(Mode, 0.0)
        self.limits, self._traits, self._policy = limits, traits, policy
        self._last_mode: Mode | None = None

    def set_policy(self, policy: Policy) -> None:
        """Goes on with a fresh policy; costs, copy and counters stay."""
        self._policy = policy

    def decide(
        self, now_s: float, running: Sequence[Servable], waiting: Sequence[Servable]
    ) -> Decision:
        """Decides how the next step runs.

        Args:
          now_s: on the clock of the requests' `waiting_since_s`.
          running: in order of admission.
          waiting: in the order in which they will be admitted.
        """
        if not running and not waiting:
            return EVERYBODY_UNMERGED
        round = Round(
            now_s,
            running,
            waiting,
            copy=self.copy,
            costs=self.costs,
            limits=self.limits,
            traits=self._traits,
        )
        decision = self._policy.decide(round)
        if decision.only is not None and not round.plan(decision):
            # Rows are full of requests that it holds back: nothing would ever free them.
            return dataclasses.replace(EVERYBODY_UNMERGED, merge=decision.merge)
        return decision

    def load_of(self, chunks: Collection[ChunkLoad], folded: Adapter | None) -> StepLoad:
        """What a planned step costs, for `observe`."""
        return load_of(chunks, folded, bucket=self.limits.bucket, traits=self._traits)

    def observe(self, load: StepLoad, ms: float) -> None:
        """Takes the time of a step that ran, more than zero."""
        self.costs.observe(load, ms)
        self.count(load, ms)

    def count(self, load: StepLoad, ms: float) -> None:
        """Counts a step of which it is not known how long it took itself."""
        self.seconds[load.mode] += ms / 1e3
        self.mode_changes += self._last_mode not in (None, load.mode)
        self._last_mode = load.mode

    def observe_merge(self, ms: float) -> None:
        """Takes the device time of a whole merge, all chunks together."""
        self.costs.observe_merge(ms)

    def copied(self, adapter: Adapter, fraction: float) -> None:
        """Takes note that so much of the copy, in (0, 1], is this adapter's; 1 makes it usable."""
        if adapter != self.copy.adapter:
            self._interrupt()
            self.switches += 1
        self.copy = Copy(adapter=adapter, fraction=fraction)

    def forget(self, adapter: Adapter) -> None:
        """Drops an adapter that no request will bring again, its copy included."""
        if adapter == self.copy.adapter:
            self._interrupt()
            self.copy = Copy()
        self._policy.forget(adapter)

    def _interrupt(self) -> None:
        self.interrupted += self.copy.begun is not None
