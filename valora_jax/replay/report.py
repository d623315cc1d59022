"""What users saw of a replay, and how the device spent its time."""

import dataclasses
from collections.abc import Iterable

from valora_jax.replay.outcome import Outcome, Served


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Mean and percentiles of one quantity, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Slo:
    """What a request must meet to count as good, in milliseconds.

    Attributes:
      ttft_ms: most until the first token.
      tpot_ms: most from token to token after that, on average.
    """

    ttft_ms: float = 500.0
    tpot_ms: float = 50.0

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "tpot_ms"):
            if not (value := getattr(self, name)) > 0:  # NaN is not, either
                raise ValueError(f"the objective {name}={value} must be positive")

    def met(self, served: Served) -> bool:
        """Whether a request that ended was served in time."""
        first_ms, next_ms = _first_token_ms(served), _next_token_ms(served)
        return first_ms <= self.ttft_ms and (next_ms is None or next_ms <= self.tpot_ms)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Figures of one replay; `dataclasses.asdict` makes a line of JSON of it.

    Attributes:
      requests: that ended; only they count in what follows.
      unserved: that did not.
      token_ms: a request's time from arrival to end, by its output tokens.
      paper_token_ms: the mean time from arrival to end by the mean of prompt and output tokens, the
        metric of the paper.
      first_token_ms: from arrival; TTFT.
      next_token_ms: from the first token to the last, by the tokens after the first; TPOT. None
        where no answer has two.
      wait_ms: from arrival to the first step that serves it.
      seconds: from the first arrival to the last end.
      tokens_per_s: output tokens in these seconds.
      requests_per_s: requests in these seconds.
      goodput_per_s: of them, those that met the objective.
      decode_ms: of steps without prompts, from any number of requests. None if there are none.
      longest_decode_ms: of these; uploads and merges that stall answers show here.
      mode_s: seconds of steps in each mode.
      switches, interrupted, refused, uploads, preemptions: see `Outcome`.
    """

    requests: int
    unserved: int
    token_ms: Spread
    paper_token_ms: float
    first_token_ms: Spread
    next_token_ms: Spread | None
    wait_ms: Spread
    seconds: float
    tokens_per_s: float
    requests_per_s: float
    goodput_per_s: float
    decode_ms: Spread | None
    longest_decode_ms: float | None
    mode_s: dict[str, float]
    switches: int
    interrupted: int
    refused: int
    uploads: int
    preemptions: int


def spread(values: Iterable[float]) -> Spread:
    """Of at least one value; a percentile is the value that so many do not exceed."""
    ordered = sorted(values)

    def percentile(p: int) -> float:
        return ordered[min(len(ordered) * p // 100, len(ordered) - 1)]

    return Spread(
        mean=sum(ordered) / len(ordered), p50=percentile(50), p90=percentile(90), p99=percentile(99)
    )


def report(outcome: Outcome, slo: Slo | None = None) -> Report:
    """Figures of a replay; `Slo()` where no objective is given.

    Raises:
      ValueError: no request ended.
    """
    slo = slo or Slo()
    served = [s for s in outcome.served if s.finished_s is not None]
    if not served:
        raise ValueError(f"none of {len(outcome.served)} requests ended, so there is no latency")
    seconds = max(_ended_s(s) for s in served) - min(s.arrival.at_s for s in served)
    gaps_ms = [gap for s in served if (gap := _next_token_ms(s)) is not None]
    decodes_ms = [step.ms for step in outcome.steps if step.prompt_tokens == 0]
    return Report(
        requests=len(served),
        unserved=len(outcome.served) - len(served),
        token_ms=spread(_total_ms(s) / s.arrival.output_tokens for s in served),
        paper_token_ms=sum(map(_total_ms, served))
        / sum(s.arrival.prompt_tokens + s.arrival.output_tokens for s in served),
        first_token_ms=spread(map(_first_token_ms, served)),
        next_token_ms=spread(gaps_ms) if gaps_ms else None,
        wait_ms=spread(map(_wait_ms, served)),
        seconds=seconds,
        tokens_per_s=sum(s.arrival.output_tokens for s in served) / seconds,
        requests_per_s=len(served) / seconds,
        goodput_per_s=sum(map(slo.met, served)) / seconds,
        decode_ms=spread(decodes_ms) if decodes_ms else None,
        longest_decode_ms=max(decodes_ms, default=None),
        mode_s={mode.value: mode_s for mode, mode_s in outcome.mode_s().items()},
        switches=outcome.switches,
        interrupted=outcome.interrupted,
        refused=outcome.refused,
        uploads=outcome.uploads,
        preemptions=outcome.preemptions,
    )


def _ended_s(served: Served) -> float:
    assert served.finished_s is not None  # the caller asks of those that ended only
    return served.finished_s


def _total_ms(served: Served) -> float:
    return 1e3 * (_ended_s(served) - served.arrival.at_s)


def _first_token_ms(served: Served) -> float:
    assert served.first_token_s is not None  # it ended
    return 1e3 * (served.first_token_s - served.arrival.at_s)


def _next_token_ms(served: Served) -> float | None:
    if (following := served.arrival.output_tokens - 1) == 0:
        return None
    return (_total_ms(served) - _first_token_ms(served)) / following


def _wait_ms(served: Served) -> float:
    assert served.admitted_s is not None  # it ended
    return 1e3 * (served.admitted_s - served.arrival.at_s)
