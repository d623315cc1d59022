"""Traces: which requests come when. Made from a seed, or read from a file."""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """One request of a trace.

    Attributes:
      at_s: when it comes, from the start of the trace.
      adapter: its number, or None for the base model.
      prompt_tokens: of text and images together.
      output_tokens: of its answer, whose end token is ignored.
    """

    at_s: float
    adapter: int | None
    prompt_tokens: int
    output_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of a kind of request, each uniform between two bounds, both included."""

    prompt: tuple[int, int]
    output: tuple[int, int]


# The paper's two applications, at 576 tokens an image. A few outputs a frame are a class or a box.
VISUAL_RETRIEVAL = Lengths(prompt=(676, 876), output=(100, 300))
VIDEO_ANALYTICS = Lengths(prompt=(3476, 3536), output=(5, 10))


def skewed(adapters: int, share: float) -> list[float]:
    """Weights of adapters: the first has `share` of the requests, the others equal parts.

    A share below an equal part means that all are alike.
    """
    share = max(share, 1 / adapters)
    others = adapters - 1
    return [share] + [(1 - share) / max(others, 1)] * others


def zipf(adapters: int, exponent: float) -> list[float]:
    """Weights of adapters: the i-th, from 1, in proportion to `i ** -exponent`."""
    weights = [i**-exponent for i in range(1, adapters + 1)]
    return [weight / sum(weights) for weight in weights]


def make_trace(
    weights: Sequence[float],
    *,
    rate: float,
    requests: int,
    lengths: Lengths = VISUAL_RETRIEVAL,
    cv: float = 1.0,
    seed: int = 0,
) -> list[Arrival]:
    """Draws requests whose gaps follow a gamma distribution.

    Args:
      weights: of adapters 0, 1, ...; see `skewed` and `zipf`.
      rate: requests a second, on average.
      requests: how many.
      lengths: of prompts and answers.
      cv: standard deviation of the gaps in units of their mean; 1 is Poisson, more is bursty.
      seed: equal seeds give equal traces, whatever the rate, apart from the scale of time.

    Raises:
      ValueError: a number is not positive.
    """
    faults = [
        f"{name}={value} must be positive"
        for name, value in {"rate": rate, "requests": requests, "cv": cv}.items()
        if value <= 0
    ]
    if faults:
        raise ValueError("\n  ".join(["the trace cannot be drawn:", *faults]))
    rng = random.Random(seed)
    now_s, shape = 0.0, cv**-2
    trace = []
    for _ in range(requests):
        now_s += rng.gammavariate(shape, 1 / (shape * rate))
        [adapter] = rng.choices(range(len(weights)), weights)
        trace.append(
            Arrival(
                at_s=now_s,
                adapter=adapter,
                prompt_tokens=rng.randint(*lengths.prompt),
                output_tokens=rng.randint(*lengths.output),
            )
        )
    return trace


def read_traces(path: Path, *, image_tokens: int) -> dict[str, list[Arrival]]:
    """Reads named traces from JSON: lists of `{"t": s, "adapter": i, "text": n, "out": n}`.

    Every request brings one image of `image_tokens` besides its text.
    """
    traces = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: [
            Arrival(
                at_s=row["t"],
                adapter=row["adapter"],
                prompt_tokens=row["text"] + image_tokens,
                output_tokens=row["out"],
            )
            for row in rows
        ]
        for name, rows in traces.items()
    }
