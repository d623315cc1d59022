"""What users saw of a replay, and how the device spent its time."""

import dataclasses
from collections.abc import Iterable

from valora_jax.replay.simulation import Simulation


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Mean and percentiles of one quantity, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Figures of one replay; `dataclasses.asdict` makes a line of JSON of it.

    Attributes:
      token_ms: a request's time from arrival to end, by its output tokens.
      paper_token_ms: the same by prompt and output tokens, the metric of the paper.
      first_token_ms: from arrival.
      wait_ms: from arrival to the first step that serves it.
      tokens_per_s: output tokens, from the first arrival to the last end.
      mode_s: seconds of steps in each mode.
      switches: merges begun.
      interrupted: merges of those that did not become whole.
    """

    token_ms: Spread
    paper_token_ms: Spread
    first_token_ms: Spread
    wait_ms: Spread
    tokens_per_s: float
    mode_s: dict[str, float]
    switches: int
    interrupted: int


def spread(values: Iterable[float]) -> Spread:
    """Of at least one value; a percentile is the value that so many do not exceed."""
    ordered = sorted(values)

    def percentile(p: int) -> float:
        return ordered[min(len(ordered) * p // 100, len(ordered) - 1)]

    return Spread(
        mean=sum(ordered) / len(ordered), p50=percentile(50), p90=percentile(90), p99=percentile(99)
    )


def report(simulation: Simulation) -> Report:
    """Of a simulation that ran to its end; requests that were aborted do not count."""
    token_ms, paper_token_ms, first_token_ms, wait_ms = [], [], [], []
    tokens, start_s, end_s = 0, float("inf"), 0.0
    for request in simulation.requests:
        arrival = request.arrival
        if request.finished_s is None or request.first_token_s is None:
            continue
        assert request.admitted_s is not None
        total_ms = 1e3 * (request.finished_s - arrival.at_s)
        token_ms.append(total_ms / arrival.output_tokens)
        paper_token_ms.append(total_ms / (arrival.prompt_tokens + arrival.output_tokens))
        first_token_ms.append(1e3 * (request.first_token_s - arrival.at_s))
        wait_ms.append(1e3 * (request.admitted_s - arrival.at_s))
        tokens += arrival.output_tokens
        start_s, end_s = min(start_s, arrival.at_s), max(end_s, request.finished_s)
    orchestrator = simulation.orchestrator
    return Report(
        token_ms=spread(token_ms),
        paper_token_ms=spread(paper_token_ms),
        first_token_ms=spread(first_token_ms),
        wait_ms=spread(wait_ms),
        tokens_per_s=tokens / (end_s - start_s),
        mode_s={mode.value: seconds for mode, seconds in orchestrator.seconds.items()},
        switches=orchestrator.switches,
        interrupted=orchestrator.interrupted,
    )
