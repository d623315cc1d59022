"""What became of a replay, in an engine or in a simulation: requests, steps, and a few counts."""

import dataclasses
from collections.abc import Sequence

from valora_jax.lora.mode import Mode
from valora_jax.replay.arrivals import Arrival


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """One request of a trace; seconds from the trace's start, None for what never happened.

    Attributes:
      admitted_s: when the first step that served it began.
      first_token_s: when its first token was there.
      finished_s: when its last one was.
    """

    arrival: Arrival
    admitted_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RanStep:
    """One step of the decoder.

    Attributes:
      start_s: when it began, from the trace's start.
      ms: what it took, with what the device did before it and after the last one.
      mode: how it used adapters.
      prompt_tokens: that it computed besides decodes.
    """

    start_s: float
    ms: float
    mode: Mode
    prompt_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A replay that ran to its end.

    Attributes:
      served: a line a request, in order of arrival.
      steps: in order.
      switches: merges begun.
      interrupted: merges of those that did not become whole.
      refused: adapters that the engine has found too weak to be merged, since its start.
      uploads: adapters written to the device.
      preemptions: requests that lost their key-value pages to others and began anew.
    """

    served: Sequence[Served]
    steps: Sequence[RanStep]
    switches: int = 0
    interrupted: int = 0
    refused: int = 0
    uploads: int = 0
    preemptions: int = 0

    def mode_s(self) -> dict[Mode, float]:
        """Seconds of steps in each mode."""
        seconds = dict.fromkeys(Mode, 0.0)
        for step in self.steps:
            seconds[step.mode] += step.ms / 1e3
        return seconds
