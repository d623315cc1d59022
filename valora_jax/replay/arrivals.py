"""Traces: which requests come when. Made from a seed, or read from a file.

A trace is a list of arrivals in order of time; adapters in it are numbers from 0.
"""

import dataclasses
import json
import math
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """One request of a trace.

    Attributes:
      at_s: when it comes, from the start of the trace.
      adapter: its number, or None for the base model.
      prompt_tokens: of text and images together.
      output_tokens: of its answer, whose end token is ignored.
      images: in the prompt, each seen for the first time.
    """

    at_s: float
    adapter: int | None
    prompt_tokens: int
    output_tokens: int
    images: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Sizes of a kind of request.

    Attributes:
      images: in each prompt.
      text: tokens of the prompt besides its images, uniform between two bounds, both included.
      output: tokens of the answer, likewise.
    """

    images: int
    text: tuple[int, int]
    output: tuple[int, int]


IMAGE_TOKENS = 576  # of LLaVA-1.5
# A file may be an excerpt, of fewer requests than the adapters that they were drawn from.
EXCERPT_ADAPTERS = 1024

# The paper's two applications. The few outputs for some frames are a class or a box.
VISUAL_RETRIEVAL = Lengths(images=1, text=(100, 300), output=(100, 300))
VIDEO_ANALYTICS = Lengths(images=6, text=(20, 80), output=(5, 10))


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
    image_tokens: int = IMAGE_TOKENS,
    cv: float = 1.0,
    seed: int = 0,
) -> list[Arrival]:
    """Draws requests whose gaps follow a gamma distribution.

    Args:
      weights: of adapters 0, 1, ...; see `skewed` and `zipf`.
      rate: requests a second, on average.
      requests: how many.
      lengths: of prompts and answers.
      image_tokens: what an image takes of a prompt.
      cv: standard deviation of the gaps in units of their mean; 1 is Poisson, more is bursty.
      seed: equal seeds give equal traces, whatever the rate, apart from the scale of time.

    Raises:
      ValueError: a number is not positive, or not finite.
    """
    faults = [
        f"{name}={value} must be positive and finite"
        for name, value in {"rate": rate, "requests": requests, "cv": cv}.items()
        if not 0 < value < math.inf
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
                prompt_tokens=lengths.images * image_tokens + rng.randint(*lengths.text),
                output_tokens=rng.randint(*lengths.output),
                images=lengths.images,
            )
        )
    return trace


def read_traces(path: Path, *, image_tokens: int = IMAGE_TOKENS) -> dict[str, list[Arrival]]:
    """Reads named traces from JSON: lists of `{"t": s, "adapter": i, "text": n, "out": n}`.

    Every request brings one image of `image_tokens` besides its text; an adapter may be null. All
    adapters up to the greatest number are there in a replay, so numbers must be below that of the
    file's requests, or below `EXCERPT_ADAPTERS`.

    Raises:
      ValueError: the file holds something else; names the first request that is wrong.
      OSError: it cannot be read.
    """
    try:
        traces = json.loads(path.read_text(encoding="utf-8"))
        adapters = max(sum(len(rows) for rows in traces.values()), EXCERPT_ADAPTERS)
        return {
            name: sorted(
                (
                    _arrival(row, f"{name}[{i}]", image_tokens=image_tokens, adapters=adapters)
                    for i, row in enumerate(rows)
                ),
                key=lambda arrival: arrival.at_s,
            )
            for name, rows in traces.items()
        }
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no traces: {type(error).__name__}: {error}; want JSON of the form "
            '{"name": [{"t": 0.5, "adapter": 0, "text": 40, "out": 16}, ...], ...}'
        ) from error


def _arrival(row: Mapping[str, Any], place: str, *, image_tokens: int, adapters: int) -> Arrival:
    """One request; `place` is where it stands in the file, for messages."""
    at_s, adapter, text, out = (row[field] for field in ("t", "adapter", "text", "out"))
    if type(at_s) not in (int, float) or not 0 <= at_s <= sys.float_info.max:
        raise ValueError(f"{place} has t={at_s!r}, want seconds from the start, at least 0")
    if adapter is not None and (type(adapter) is not int or not 0 <= adapter < adapters):
        raise ValueError(
            f"{place} has adapter={adapter!r}, want null or a whole number in [0, {adapters})"
        )
    for field, tokens in {"text": text, "out": out}.items():
        if type(tokens) is not int or tokens < 1:
            raise ValueError(f"{place} has {field}={tokens!r}, want a whole number of tokens, >= 1")
    return Arrival(
        at_s=float(at_s),
        adapter=adapter,
        prompt_tokens=text + image_tokens,
        output_tokens=out,
        images=1,
    )


def at_once(trace: Iterable[Arrival]) -> list[Arrival]:
    """The same requests, all there at the start."""
    return [dataclasses.replace(arrival, at_s=0.0) for arrival in trace]


def without_adapters(trace: Iterable[Arrival]) -> list[Arrival]:
    """The same requests, all to the base model: what no policy can beat."""
    return [dataclasses.replace(arrival, adapter=None) for arrival in trace]
