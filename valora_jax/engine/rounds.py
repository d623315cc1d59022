"""What a policy sees before a step, the `Round`, and what it says, the `Decision`.

Terms (paper, section 4): a step is *unmerged* when everybody adds their own adapter to the base
weights; *merged* when it runs on a copy of the weights with one adapter folded in, which then costs
nothing; a *mixture* when others ride on that copy, subtract what is folded and add their own.
"""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, Protocol

from valora_jax.engine.costs import StepCosts, StepLoad
from valora_jax.lora.mode import Mode

type Adapter = Hashable  # in the engine an AdapterRef: a version, so a reloaded name is another one
type Chunks = list[ChunkLoad]  # in the step's order


class Servable(Protocol):
    """A request, as far as policies look at it; equal to itself only.

    Attributes:
      adapter: None for the base model.
      waiting_since_s: when it came, or, once served, when the last step that served it ended.
      remaining: tokens to compute before its next one can be sampled; 1 in a decode.
      new_images: encoded before the next step that serves it, at most.
    """

    @property
    def adapter(self) -> Adapter | None: ...
    @property
    def waiting_since_s(self) -> float: ...
    @property
    def remaining(self) -> int: ...
    @property
    def new_images(self) -> int: ...


class ChunkLoad(NamedTuple):
    """What a step does for one request.

    Attributes:
      adapter: None for the base model.
      tokens: that it computes, 1 in a decode.
      images: that are encoded for it, before the step.
    """

    adapter: Adapter | None
    tokens: int
    images: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterTraits:
    """What a policy needs to know of an adapter.

    Attributes:
      pages: pages of 16 ranks, a linear's average.
      mergeable: whether its update survives the rounding of the merged copy. One that is too weak
        neither merges nor rides in a mixture, where the copy's rounding would drown it.
    """

    pages: float
    mergeable: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepLimits:
    """What a step can hold; the scheduler's limits.

    Attributes:
      max_requests: rows.
      max_tokens_per_step: over all chunks.
      max_prefill_chunks: in a step.
      bucket: (decodes, prompt tokens) -> the compiled shape that holds them.
      merge_chunk_ms: device time between two steps that a merge may take.
    """

    max_requests: int
    max_tokens_per_step: int
    max_prefill_chunks: int
    bucket: Callable[[int, int], Hashable]
    merge_chunk_ms: float = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """The merged copy: whose it is, and how much of it is filled, in [0, 1]."""

    adapter: Adapter | None = None
    fraction: float = 0.0

    @property
    def usable(self) -> Adapter | None:
        """The adapter that a step may run with."""
        return self.adapter if self.fraction >= 1 else None

    @property
    def begun(self) -> Adapter | None:
        """The adapter of which only a part is filled; nobody's copy has none."""
        return self.adapter if self.usable is None else None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """How the next step runs.

    Attributes:
      folded: whose copy the step uses; None for the base weights.
      only: adapters (None: the base model) whose requests the step may serve; None is everybody's.
      merge: the adapter whose copy gets its next chunk after this step; None leaves the copy as it
        is, whole or not, so that an interrupted merge can go on later.
    """

    folded: Adapter | None = None
    only: frozenset[Adapter | None] | None = None
    merge: Adapter | None = None

    def serves(self, request: Servable) -> bool:
        """Whether the step may serve a request."""
        return self.only is None or request.adapter in self.only


EVERYBODY_UNMERGED = Decision()


class Round:
    """What a policy decides on: the requests of one moment, the copy, and what steps would cost.

    Attributes:
      now_s: on the clock of the requests.
      running: in order of admission.
      waiting: in the order in which they will be admitted.
      copy: as it is now.
      costs: estimates.
      limits: the scheduler's.
    """

    def __init__(
        self,
        now_s: float,
        running: Sequence[Servable],
        waiting: Sequence[Servable],
        *,
        copy: Copy,
        costs: StepCosts,
        limits: StepLimits,
        traits: Callable[[Adapter], AdapterTraits],
    ):
        self.now_s, self.running, self.waiting = now_s, running, waiting
        self.copy, self.costs, self.limits, self.traits = copy, costs, limits, traits

    def requests(self) -> collections.Counter[Adapter | None]:
        """Running and waiting requests of each adapter."""
        counts = collections.Counter(request.adapter for request in self.running)
        counts.update(request.adapter for request in self.waiting)
        return counts

    def plan(self, decision: Decision) -> list[tuple[Servable, int]]:
        """What the scheduler would plan, pages and gates aside: requests and numbers of tokens."""
        return plan_step(decision, self.running, self.waiting, limits=self.limits)

    def chunks(self, decision: Decision) -> Chunks:
        """What `plan` does for the requests."""
        return chunks_of(self.plan(decision))

    def estimate_ms(self, chunks: Chunks, folded: Adapter | None) -> float:
        """Time of a step of these chunks with `folded` in its weights."""
        load = load_of(chunks, folded, bucket=self.limits.bucket, traits=self.traits)
        return self.costs.estimate_ms(load)

    def waited_s(self, request: Servable) -> float:
        return self.now_s - request.waiting_since_s


def plan_step[Request: Servable](
    decision: Decision,
    running: Sequence[Request],
    waiting: Sequence[Request],
    *,
    limits: StepLimits,
) -> list[tuple[Request, int]]:
    """What the scheduler would plan, pages and gates aside: decodes, running prompts, admissions.

    Returns:
      Requests, and how many tokens of each the step computes.
    """
    only = decision.only
    served = [request for request in running if only is None or request.adapter in only]
    plan = [(request, 1) for request in served if request.remaining == 1]
    budget, prefills = limits.max_tokens_per_step - len(plan), 0
    for request in served:
        if request.remaining > 1 and budget and prefills < limits.max_prefill_chunks:
            length = min(request.remaining, budget)
            plan.append((request, length))
            budget -= length
            prefills += length > 1
    rows = limits.max_requests - len(running)
    for request in waiting:
        if rows <= 0 or budget == 0 or prefills == limits.max_prefill_chunks:
            break
        if only is not None and request.adapter not in only:
            continue
        if prefills and budget < request.remaining <= limits.max_tokens_per_step:
            break  # the scheduler does not cut what a step can hold whole
        length = min(request.remaining, budget)
        plan.append((request, length))
        budget -= length
        prefills += length > 1
        rows -= 1
    return plan


def chunks_of(plan: Iterable[tuple[Servable, int]]) -> Chunks:
    """What a plan does for its requests, whose images are new until the scheduler admits them."""
    return [ChunkLoad(request.adapter, tokens, request.new_images) for request, tokens in plan]


def load_of(
    chunks: Iterable[ChunkLoad],
    folded: Adapter | None,
    *,
    bucket: Callable[[int, int], Hashable],
    traits: Callable[[Adapter], AdapterTraits],
) -> StepLoad:
    """What a step of these chunks costs, with `folded` in its weights."""
    decodes = prompt_tokens = images = 0
    tokens_of: dict[Adapter | None, int] = {}
    for adapter, tokens, new_images in chunks:
        if tokens == 1:
            decodes += 1
        else:
            prompt_tokens += tokens
        images += new_images
        tokens_of[adapter] = tokens_of.get(adapter, 0) + tokens
    pages = token_pages = 0.0
    others = 0  # tokens that subtract what is folded
    for adapter, tokens in tokens_of.items():
        if adapter == folded:  # also the base model in an unmerged step
            continue
        others += tokens
        if adapter is not None:
            own = traits(adapter).pages
            pages += own
            token_pages += tokens * own
    mode = Mode.UNMERGED
    if folded is not None:
        mode = Mode.MIXTURE if others else Mode.MERGED
        if others:
            subtracted = traits(folded).pages
            pages += subtracted
            token_pages += others * subtracted
    return StepLoad(
        bucket=bucket(decodes, prompt_tokens),
        mode=mode,
        decodes=decodes,
        prompt_tokens=prompt_tokens,
        images=images,
        pages=pages,
        token_pages=token_pages,
    )


class Policy(Protocol):
    """Chooses; keeps what it needs from round to round. `policies.make_policy` has the four."""

    def decide(self, round: Round) -> Decision:
        """Decides on a round that has requests."""
        ...

    def forget(self, adapter: Adapter) -> None:
        """Drops what it remembers of an adapter that is gone."""
        ...
