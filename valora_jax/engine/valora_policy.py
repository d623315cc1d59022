"""Algorithm 1 of the VaLoRA paper, with measured costs in place of its fixed shares.

Each round compares what a step would take: for everybody, on the base weights (unmerged) or on the
copy (mixture); and for some, the requests of the copy's adapter alone (merged), which leaves the
others waiting. Holding back pays if the mean time of a token falls: with `t` for some and `t + d`
for everybody, and a share `q` of the requests served in every k-th step only, it is

    ((k - 1) t + t + d) ((1 - q) / k + q),  least at  k = sqrt(d (1 - q) / (t q)).

Those who only decode are also left out of a step with prompts, where LoRA costs most, if that costs
less than what everybody loses: they decode in the next step, which they make longer by less, and
end one step later. Of several, only the last is in a step with LoRA that would have been without.

The paper goes by shares of a batch: merged above one half. That fits a LoRA that makes steps nearly
twice as long; where a step pays a few per cent, holding back half the requests does not.
"""

import collections
import dataclasses
import itertools
import math

from valora_jax.engine.rounds import (
    EVERYBODY_UNMERGED,
    Adapter,
    ChunkLoad,
    Chunks,
    Decision,
    Round,
    Servable,
    chunks_of,
)

_LEAST_GAIN = 0.02  # of the mean time of a token, below which nobody is held back
_LEAST_MODE_GAIN = 0.02  # of a step's time, below which the mode stays; estimates err by as much
_HORIZON_S = 5.0  # how long what a copy would have saved is remembered, and expected to go on
_RETURN = 2.0  # gain of a merge in units of its cost and of the gain that it gives up


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Way:
    """One of the ways to serve some and let the others wait.

    Attributes:
      token_ms: mean time of a request's token.
      patience: how many steps in a row may leave the others out.
      row_patience: the same while requests wait for their rows.
    """

    token_ms: float
    patience: float = 0
    row_patience: float = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Choice:
    """The best use of one copy.

    Attributes:
      everybody: serves all.
      everybody_ms: time of that step.
      some: serves those who gain; None if that does not pay.
      way: to do so, or to serve everybody.
      unmerged_ms: time of everybody's step without a copy.
    """

    everybody: Decision
    everybody_ms: float
    some: Decision | None = None
    way: _Way
    unmerged_ms: float


class Valora:
    """Merged while it pays, then mixture, then unmerged; nobody is held back longer than theta.

    A request's credit is the time it waited, the time of the steps until it was served (those who
    wait before it go first) and that of a merge's next chunk. When one passes theta, or as many
    steps have left it out as pays, the next one serves everybody. While rows are short, no two in a
    row leave anybody out.

    Another adapter is folded in once that would have saved, in the steps of the last seconds, twice
    what the merge costs and twice what the present copy saved. So merges stay rare where adapters
    are alike, and what they cost is bounded by what there was to save, whatever the requests do.
    """

    def __init__(self, *, max_wait_s: float):
        """Makes a policy for an empty engine.

        Args:
          max_wait_s: theta, what a latency objective leaves for waiting: until the first token and
            from token to token.
        """
        self._max_wait_s = max_wait_s
        self._on_copy = False  # the mode of the last step for everybody
        self._missed: dict[Servable, int] = {}  # steps in a row, those in flight included
        self._gains = _Gains()

    def decide(self, round: Round) -> Decision:
        plan = round.plan(EVERYBODY_UNMERGED)
        chunks = chunks_of(plan)
        choice = self._best(round, chunks, round.copy.usable)
        self._on_copy = choice.everybody.folded is not None
        merge = self._next_merge(round, chunks, choice)
        decision, missed = choice.everybody, {}
        if choice.some is not None:
            left_out = [request for request, _ in plan if not choice.some.serves(request)]
            if not self._starves(round, choice, left_out, merging=merge is not None):
                decision = choice.some
                missed = {request: self._missed.get(request, 0) + 1 for request in left_out}
        self._missed = missed
        return dataclasses.replace(decision, merge=merge)

    def forget(self, adapter: Adapter) -> None:
        self._gains.forget(adapter)

    def _best(self, round: Round, chunks: Chunks, folded: Adapter | None) -> _Choice:
        """The best use of a copy with `folded` for a step of `chunks`."""
        unmerged_ms = round.estimate_ms(chunks, None)
        everybody, everybody_ms = EVERYBODY_UNMERGED, unmerged_ms
        adapters = {chunk.adapter for chunk in chunks}
        weak = {a for a in adapters if a is not None and not round.traits(a).mergeable}
        if folded is not None and not weak:
            copy_ms = round.estimate_ms(chunks, folded)
            gain = _LEAST_MODE_GAIN * unmerged_ms * (-1 if self._on_copy else 1)
            merged = adapters == {folded}  # less work, whatever it takes
            if merged or copy_ms < unmerged_ms - gain:
                everybody = Decision(folded=folded)
                everybody_ms = copy_ms
        best = _Choice(
            everybody=everybody,
            everybody_ms=everybody_ms,
            way=_Way(token_ms=everybody_ms),
            unmerged_ms=unmerged_ms,
        )
        for some in _some(adapters, folded, weak):
            served = [chunk for chunk in chunks if chunk.adapter in some]
            if not served or len(served) == len(chunks):
                continue
            some_ms = round.estimate_ms(served, folded)
            way = min(
                _in_every_kth(some_ms, everybody_ms, 1 - len(served) / len(chunks)),
                _one_later(round, chunks, some, folded, some_ms=some_ms),
                key=lambda way: way.token_ms,
            )
            if way.token_ms < min(best.way.token_ms, (1 - _LEAST_GAIN) * everybody_ms):
                only = Decision(folded=folded, only=some)
                best = dataclasses.replace(best, some=only, way=way)
        return best

    def _starves(
        self, round: Round, choice: _Choice, left_out: list[Servable], *, merging: bool
    ) -> bool:
        """Whether one of those whom `choice.some` leaves out must not wait any more.

        `left_out` are those who would be in everybody's step; others wait for room, too.
        """
        assert choice.some is not None
        # Who is held back keeps its row: where rows are short, others wait for it in turn.
        rows_short = len(round.running) + len(round.waiting) > round.limits.max_requests
        patience = choice.way.row_patience if rows_short else choice.way.patience
        if any(self._missed.get(request, 0) >= patience for request in left_out):
            return True
        step_s = choice.everybody_ms / 1e3
        chunk_s = round.limits.merge_chunk_ms / 1e3 if merging else 0.0
        tokens = 0
        for request in itertools.chain(round.running, round.waiting):
            if choice.some.serves(request):
                continue
            tokens += request.remaining
            steps = math.ceil(tokens / round.limits.max_tokens_per_step)
            if round.waited_s(request) + steps * (step_s + chunk_s) > self._max_wait_s:
                return True
        return False

    def _next_merge(self, round: Round, chunks: Chunks, choice: _Choice) -> Adapter | None:
        """Whose copy to work on: the one begun, or one that would have paid for itself."""
        rival, begun = _rival(round, chunks), round.copy.begun
        self._gains.move_to(round.now_s)
        if round.copy.usable is not None:
            self._gains.add(round.copy.usable, choice.unmerged_ms - choice.way.token_ms)
        if rival is not None:
            alone = self._best(round, chunks, rival)
            self._gains.add(rival, alone.unmerged_ms - alone.way.token_ms)
        if begun is not None and any(chunk.adapter == begun for chunk in chunks):
            return begun
        if rival is None:
            return None
        ours_ms = 0.0 if round.copy.usable is None else self._gains.of(round.copy.usable)
        price_ms = _RETURN * (round.costs.merge_ms + ours_ms)
        return rival if self._gains.of(rival) > price_ms else None


class _Gains:
    """What a copy would have saved lately, by adapter: sums that fade over `_HORIZON_S`."""

    def __init__(self) -> None:
        self._sums: dict[Adapter, float] = {}
        self._origin_s = self._now_s = 0.0

    def move_to(self, now_s: float) -> None:
        self._now_s = now_s
        if (elapsed_s := now_s - self._origin_s) > 10 * _HORIZON_S:  # before the weights overflow
            fade = math.exp(-elapsed_s / _HORIZON_S)
            self._sums = {a: x * fade for a, x in self._sums.items() if x * fade > 1e-3}
            self._origin_s = now_s

    def add(self, adapter: Adapter, ms: float) -> None:
        # New ones weigh more instead of all others less, which would cost a loop every round.
        self._sums[adapter] = self._sums.get(adapter, 0.0) + ms * self._weight()

    def of(self, adapter: Adapter) -> float:
        return self._sums.get(adapter, 0.0) / self._weight()

    def forget(self, adapter: Adapter) -> None:
        self._sums.pop(adapter, None)

    def _weight(self) -> float:
        return math.exp((self._now_s - self._origin_s) / _HORIZON_S)


def _some(
    adapters: set[Adapter | None], folded: Adapter | None, weak: set[Adapter]
) -> list[frozenset[Adapter | None]]:
    """Whom a step on the copy could serve alone: its adapter; all but those too weak for it."""
    if folded is None:
        return []
    some: list[frozenset[Adapter | None]] = [frozenset([folded])]
    if weak:
        some.append(frozenset(adapters - weak))
    return some


def _in_every_kth(some_ms: float, everybody_ms: float, held: float) -> _Way:
    """The share `held` of the requests is served in one step of the best number only."""
    extra_ms = max(everybody_ms - some_ms, 0.0)
    period = max(round(math.sqrt(extra_ms * (1 - held) / (some_ms * held))), 1)
    token_ms = (period * some_ms + extra_ms) * ((1 - held) / period + held)
    return _Way(token_ms=token_ms, patience=period - 1)


def _one_later(
    round: Round,
    chunks: Chunks,
    some: frozenset[Adapter | None],
    folded: Adapter | None,
    *,
    some_ms: float,
) -> _Way:
    """Those who are not of `some` decode in the next step, also where that has prompts again."""
    token_ms = some_ms + _decode_later_ms(round, chunks, some, folded)
    return _Way(token_ms=token_ms, patience=1, row_patience=1)


def _decode_later_ms(
    round: Round, chunks: Chunks, some: frozenset[Adapter | None], folded: Adapter | None
) -> float:
    """What a token's mean time rises by if those who are not of `some` decode in a later step.

    Infinite unless that step differs from this one, which has prompts, all of them of `some`.
    """
    held = [chunk for chunk in chunks if chunk.adapter not in some]
    if any(chunk.tokens > 1 for chunk in held) or all(chunk.tokens == 1 for chunk in chunks):
        return math.inf
    decodes = [ChunkLoad(chunk.adapter, 1) for chunk in chunks]
    everybody_ms = round.estimate_ms(decodes, None)
    some_ms = round.estimate_ms([chunk for chunk in decodes if chunk.adapter in some], folded)
    later_ms = everybody_ms
    if len(held) > 1:  # LoRA is in that step anyway, and they add their rows
        alike = [c if c.adapter in some else ChunkLoad(folded, 1) for c in decodes]
        later_ms = max(round.estimate_ms(alike, folded), some_ms)
    return later_ms - some_ms + everybody_ms * len(held) / len(chunks)


def _rival(round: Round, chunks: Chunks) -> Adapter | None:
    """The adapter of most tokens, weighed by its pages, of those that could be folded in next."""
    weight: dict[Adapter, float] = collections.defaultdict(float)
    for adapter, tokens, _ in chunks:
        if adapter is not None and adapter != round.copy.usable:
            traits = round.traits(adapter)
            if traits.mergeable:
                weight[adapter] += tokens * traits.pages
    return max(weight, key=weight.__getitem__, default=None)
