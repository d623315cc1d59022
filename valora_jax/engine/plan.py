"""What the scheduler says of a step, and what it asks of those who lend requests something."""

import dataclasses
from typing import Protocol

from valora_jax.engine.request import Request


class Gate(Protocol):
    """Something that a request needs while it runs, such as a place for its adapter."""

    def acquire(self, request: Request) -> bool:
        """Takes it, or returns False and holds nothing.

        `request.computed` is the number of tokens that the prefix cache already has.
        """
        ...

    def release(self, request: Request) -> None:
        """Gives back what `acquire` took."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one request in one step: positions `[start, start + length)`.

    `samples` says that the chunk reaches the request's last token, so that the step samples the
    next one. A decode's token may still be unknown to the host; it is the one the row sampled last.
    """

    request: Request
    start: int
    length: int
    samples: bool

    @property
    def stop(self) -> int:
        """The position after the last one."""
        return self.start + self.length


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """One step. No chunk reads a page that another chunk of the same plan writes.

    Attributes:
      decodes: chunks of one token, whatever it is.
      prefills: longer chunks.
      preempted: requests that lost their row and pages; a plan may hold nothing but these.
    """

    decodes: list[Chunk]
    prefills: list[Chunk]
    preempted: list[Request]

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """All of them, in the order of the step's rows."""
        return (*self.decodes, *self.prefills)

    @property
    def tokens(self) -> int:
        return len(self.decodes) + sum(chunk.length for chunk in self.prefills)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Folded:
    """The adapter in a step's weights.

    Attributes:
      slot: where its rank pages are.
      changes_head: whether its rows need more than the merged weights.
    """

    slot: int
    changes_head: bool
