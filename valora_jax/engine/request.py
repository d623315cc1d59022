"""One answer being generated: what was asked, and how far it is.

Tokens have positions: the prompt, the outputs known to the host, then `pending` tokens that the
device has sampled or will sample in a step already enqueued. `computed` counts the positions whose
keys and values are computed or enqueued; everything before it may be read by a later step.
"""

import dataclasses
import enum
import itertools
from collections.abc import Sequence
from typing import Literal

from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.lora.host_store import AdapterRef

FinishReason = Literal["stop", "length", "abort"]


class Phase(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpan:
    """The token slots that the features of one image fill: `[start, start + length)`."""

    content_hash: bytes
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class Request:
    """One prompt and one answer; equal to itself only, so that it can key a dict.

    Attributes:
      id: unique name.
      prompt_token_ids: placeholders of images expanded; never changed.
      params: with n=1.
      images: in order, without overlap.
      adapter: None for the base model.
      cache_salt: part of the prefix cache's key; requests of different salts share no pages.
      needs_prompt_logits: wants something of every prompt token, so all of them are computed
        and none is taken from the prefix cache.
      needs_classes: wants what its adapter's task head says of the last prompt token.
      arrival_s: when it came, on the engine's clock.
      waiting_since_s: when it came, or, once served, when the last step that served it was enqueued
        or ended; kept by the engine's loop.
      output_token_ids: known to the host.
      pending: tokens sampled by enqueued steps that the host has not read yet.
      computed: positions whose keys and values are computed or enqueued.
      output_limit: most output tokens; set by the scheduler from `params` and the engine's limit.
      phase: set by the scheduler, like all below.
      finish_reason: None until finished.
      row: its row in the device's sampling state, while running.
      pages: page of each `page_tokens` positions, while running.
      page_digests: keys of its full pages in the prefix cache, as far as tokens are known.
      committed_pages: its first pages that the prefix cache has seen.
      cached_tokens: taken from the prefix cache at the first admission.
      overtaken: times that a later request was admitted before it.
      preemptions: times that it lost its pages.

    Raises:
      ValueError: there are no tokens, or the images do not lie in order within them.
    """

    id: str
    prompt_token_ids: Sequence[int] = dataclasses.field(repr=False)
    params: SamplingParams
    images: tuple[ImageSpan, ...] = ()
    adapter: AdapterRef | None = None
    cache_salt: bytes = b""
    needs_prompt_logits: bool = False
    needs_classes: bool = False
    arrival_s: float = 0.0

    waiting_since_s: float = dataclasses.field(default=0.0, init=False)
    output_token_ids: list[int] = dataclasses.field(default_factory=list, init=False, repr=False)
    pending: int = dataclasses.field(default=0, init=False)
    computed: int = dataclasses.field(default=0, init=False)
    output_limit: int = dataclasses.field(default=0, init=False)
    phase: Phase = dataclasses.field(default=Phase.WAITING, init=False)
    finish_reason: FinishReason | None = dataclasses.field(default=None, init=False)
    row: int | None = dataclasses.field(default=None, init=False)
    pages: list[int] = dataclasses.field(default_factory=list, init=False, repr=False)
    page_digests: list[bytes] = dataclasses.field(default_factory=list, init=False, repr=False)
    committed_pages: int = dataclasses.field(default=0, init=False)
    cached_tokens: int = dataclasses.field(default=0, init=False)
    overtaken: int = dataclasses.field(default=0, init=False)
    preemptions: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        self.waiting_since_s = self.arrival_s
        if not self.prompt_token_ids:
            raise ValueError(f"request {self.id!r} has no prompt tokens; give it at least one")
        bounds = [0, *itertools.chain.from_iterable((i.start, i.end) for i in self.images)]
        bounds.append(len(self.prompt_token_ids))
        if any(a > b for a, b in itertools.pairwise(bounds)):
            spans = ", ".join(f"[{i.start}, {i.end})" for i in self.images)
            raise ValueError(
                f"request {self.id!r} has images at {spans} in {len(self.prompt_token_ids)} "
                "tokens; give spans in order, without overlap, within the prompt"
            )

    @property
    def known(self) -> int:
        """Number of tokens whose value the host knows."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def total(self) -> int:
        """Number of tokens, those included that the device has still to hand over."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.pending

    @property
    def remaining(self) -> int:
        """Number of tokens still to compute before the next one can be sampled."""
        return self.total - self.computed

    @property
    def new_images(self) -> int:
        """Number of images to encode when it is admitted, if no features are known."""
        return len(self.images) if self.phase is Phase.WAITING else 0

    @property
    def outputs_planned(self) -> bool:
        """Whether every output that the limit allows is known or pending."""
        return len(self.output_token_ids) + self.pending >= self.output_limit

    def known_tokens(self, start: int = 0, stop: int | None = None) -> list[int]:
        """Token ids at positions `[start, stop)`, up to the last known one by default.

        Costs the length of the slice, not of the request.

        Raises:
          ValueError: a position is negative or its token is not known yet.
        """
        known = self.known
        stop = known if stop is None else stop
        if not 0 <= start <= stop <= known:
            raise ValueError(
                f"tokens [{start}, {stop}) of request {self.id!r}, which knows {known}"
            )
        n = len(self.prompt_token_ids)
        head = self.prompt_token_ids[start:stop] if start < n else ()
        tail = self.output_token_ids[max(start - n, 0) : stop - n] if stop > n else ()
        return [*head, *tail]
