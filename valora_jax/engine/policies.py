"""Four ways to choose: `valora`, and for comparison `unmerged`, `merged` and `dlora`."""

import collections
import math
from typing import get_args

from valora_jax.config import PolicyName
from valora_jax.engine.rounds import EVERYBODY_UNMERGED, Adapter, Decision, Policy, Round, Servable
from valora_jax.engine.valora_policy import Valora


def make_policy(name: PolicyName, *, max_wait_s: float) -> Policy:
    """A policy by name.

    Args:
      name: "valora" is Algorithm 1 of the paper; "unmerged" serves all as they come, like Punica
        and S-LoRA; "merged" serves one adapter at a time; "dlora" follows dLoRA (OSDI'24).
      max_wait_s: how long a policy may hold back a request; theta of the paper.

    Raises:
      ValueError: there is no such policy, or the wait is not positive.
    """
    if max_wait_s <= 0:
        raise ValueError(f"max_wait_s={max_wait_s} must be positive: a step takes time itself")
    match name:
        case "valora":
            return Valora(max_wait_s=max_wait_s)
        case "unmerged":
            return Unmerged()
        case "merged":
            return Merged(max_wait_s=max_wait_s)
        case "dlora":
            return DLora(max_wait_s=max_wait_s)
    raise ValueError(f"unknown policy {name!r}; there are {', '.join(get_args(PolicyName))}")


class Unmerged:
    """Serves everybody, always."""

    def decide(self, round: Round) -> Decision:
        return EVERYBODY_UNMERGED

    def forget(self, adapter: Adapter) -> None:
        pass


class Merged:
    """Serves one adapter at a time, merged as soon as its copy is whole.

    Stays with it until it has no requests, or another's has waited too long; then the adapter of
    the request that waits longest is next. So that it does not merge all the time when everybody
    has waited too long, it stays as long as some merges take. Adapters that cannot merge are served
    unmerged.
    """

    _STAY_MERGES = 10

    def __init__(self, *, max_wait_s: float):
        self._max_wait_s = max_wait_s
        self._current: Adapter | None = None
        self._since_s = -math.inf

    def decide(self, round: Round) -> Decision:
        requests = [*round.running, *round.waiting]
        oldest = min(requests, key=lambda request: request.waiting_since_s)
        idle = all(request.adapter != self._current for request in requests)
        stayed_s = round.now_s - self._since_s
        settled = stayed_s > self._STAY_MERGES * round.costs.merge_ms / 1e3
        if idle or (settled and round.waited_s(oldest) > self._max_wait_s):
            self._current, self._since_s = oldest.adapter, round.now_s
        current = self._current
        only = frozenset([current])
        if current is None or not round.traits(current).mergeable:
            return Decision(only=only)
        if round.copy.usable == current:
            return Decision(folded=current, only=only)
        return Decision(only=only, merge=current)

    def forget(self, adapter: Adapter) -> None:
        pass  # without requests it is left anyway


class DLora:
    """dLoRA's thresholds and credits, with this device's times in place of its constants.

    The batch is what first come, first served would run. Merged steps begin when one adapter has
    `enter` of a batch's number of requests and end below `leave`; both thresholds move by AIMD, by
    what either way would have served a second. An adapter that is held back earns credit from the
    one that runs; from an upper mark of credit on nobody merges until it fell below the lower one.

    Unlike in dLoRA, requests go on unmerged while the copy is filled, the marks are times, `enter`
    stays at most 1, which it starts from, and credit is paid back in unmerged steps: there both
    could forbid merging for good.
    """

    _ADD, _MULTIPLY = 0.05, 1.1

    def __init__(self, *, max_wait_s: float):
        self._upper_ms = 1e3 * max_wait_s
        self._lower_ms = self._upper_ms / 2
        self._enter = 1.0
        self._leave: float | None = None  # starts as the ratio of the times of a step
        self._credit_ms: dict[Adapter | None, float] = collections.defaultdict(float)
        self._owed: set[Adapter | None] = set()
        self._active: Adapter | None = None
        self._merged_ms = self._unmerged_ms = 0.0
        self._merged_served = self._unmerged_served = 0

    def decide(self, round: Round) -> Decision:
        batch = self._batch(round)
        counts = round.requests()
        hot = next((a for a, _ in counts.most_common() if self._may(a, round)), None)
        merged_ms, unmerged_ms = self._times(round, hot)
        self._count(round, merged_ms, unmerged_ms, 0 if hot is None else counts[hot], len(batch))
        if self._serves_starving(batch, unmerged_ms) or hot is None:
            return self._unmerge(round)
        if self._leave is None:
            self._leave = merged_ms / unmerged_ms
        active = self._active
        if self._may(active, round) and counts[active] >= self._leave * len(batch):
            return self._merge(active, round, batch, merged_ms)
        if counts[hot] >= self._enter * len(batch):
            self._adapt(merged=self._active is not None, switch_ms=round.costs.merge_ms)
            self._active = hot
            return self._merge(hot, round, batch, merged_ms)
        return self._unmerge(round)

    def forget(self, adapter: Adapter) -> None:
        self._credit_ms.pop(adapter, None)
        self._owed.discard(adapter)
        if self._active == adapter:
            self._active = None

    def _may(self, adapter: Adapter | None, round: Round) -> bool:
        """Whether an adapter can merge and does not owe too much to those whom it held back."""
        if adapter is None or self._credit_ms.get(adapter, 0.0) < -self._upper_ms:
            return False
        return round.traits(adapter).mergeable

    @staticmethod
    def _batch(round: Round) -> list[Servable]:
        free = round.limits.max_requests - len(round.running)
        return [*round.running, *round.waiting[:free]]

    @staticmethod
    def _times(round: Round, hot: Adapter | None) -> tuple[float, float]:
        """Of a step of the batch, if all of it were `hot`'s and merged, and as it is."""
        chunks = round.chunks(EVERYBODY_UNMERGED)
        unmerged = round.estimate_ms(chunks, None)
        if hot is None:
            return unmerged, unmerged
        alike = [chunk._replace(adapter=hot) for chunk in chunks]
        return round.estimate_ms(alike, hot), unmerged

    def _count(
        self, round: Round, merged_ms: float, unmerged_ms: float, hot: int, batch: int
    ) -> None:
        self._merged_ms += merged_ms
        self._unmerged_ms += unmerged_ms
        self._merged_served += min(hot, round.limits.max_requests)
        self._unmerged_served += batch

    def _serves_starving(self, batch: list[Servable], unmerged_ms: float) -> bool:
        """Whether adapters with much credit are to be served now; they pay for it."""
        present = {request.adapter for request in batch}
        self._owed |= {a for a in present if self._credit_ms.get(a, 0.0) >= self._upper_ms}
        for adapter in [*self._owed]:
            self._credit_ms[adapter] -= unmerged_ms
            if self._credit_ms[adapter] < self._lower_ms or adapter not in present:
                self._owed.discard(adapter)
        return bool(self._owed)

    def _merge(
        self, adapter: Adapter, round: Round, batch: list[Servable], merged_ms: float
    ) -> Decision:
        if round.copy.usable != adapter:
            return Decision(merge=adapter)
        for other in {request.adapter for request in batch} - {adapter}:
            self._credit_ms[other] += merged_ms
            self._credit_ms[adapter] -= merged_ms
        return Decision(folded=adapter, only=frozenset([adapter]))

    def _unmerge(self, round: Round) -> Decision:
        if self._active is not None:
            self._adapt(merged=True, switch_ms=round.costs.merge_ms)
            self._active = None
        return EVERYBODY_UNMERGED

    def _adapt(self, *, merged: bool, switch_ms: float) -> None:
        """Moves a threshold by what the phase that ends now would have served either way."""
        merged_rate = self._merged_served / (self._merged_ms + switch_ms)
        unmerged_rate = self._unmerged_served / max(self._unmerged_ms, 1e-9)
        assert self._leave is not None  # set before the first phase began
        if merged:
            if merged_rate > unmerged_rate:
                self._enter = max(self._enter - self._ADD, self._leave + self._ADD)
            else:
                # No batch has more than all of it, and only a merged phase moves this back down.
                self._enter = min(self._enter * self._MULTIPLY, 1.0)
        elif merged_rate > unmerged_rate:
            self._leave /= self._MULTIPLY
        else:
            self._leave = min(self._leave + self._ADD, self._enter - self._ADD)
        self._merged_ms = self._unmerged_ms = 0.0
        self._merged_served = self._unmerged_served = 0
