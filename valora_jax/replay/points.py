"""The traces of a sweep: each is one point of its plots, under every policy."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

from valora_jax.replay.arrivals import (
    IMAGE_TOKENS,
    VIDEO_ANALYTICS,
    VISUAL_RETRIEVAL,
    Arrival,
    at_once,
    make_trace,
    read_traces,
    skewed,
    zipf,
)
from valora_jax.replay.settings import ReplaySettings

LENGTHS = {"retrieval": VISUAL_RETRIEVAL, "video": VIDEO_ANALYTICS}
DEFAULT_LOADS = (0.3, 0.6, 0.8)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A trace and what it stands for.

    Attributes:
      kind: of requests, or the name of the file that they are from.
      adapters: that requests name.
      spread: of requests over adapters, or the trace's name in its file.
      load: rate in units of the capacity; None where it was not given so.
      rate: requests a second; None if all come at once.
      trace: the requests.
      from_file: whether `spread` is a name in a file, whose traces differ in their rate.
    """

    kind: str
    adapters: int
    spread: str
    load: float | None
    rate: float | None
    trace: list[Arrival]
    from_file: bool = False

    @property
    def pace(self) -> str:
        """How requests come, in a word."""
        if self.rate is None:
            return "at once"
        return f"rate {self.rate:.4g}" if self.load is None else f"load {self.load:g}"


def kind_trace(settings: ReplaySettings, *, image_tokens: int, requests: int) -> list[Arrival]:
    """Requests of the kind that is asked for, or of the file's first trace: for a capacity, and to
    warm up."""
    if settings.trace is not None:
        return next(iter(_read(settings, image_tokens).values()))[:requests]
    return make_trace(
        skewed(1, 0.0),
        rate=1.0,
        requests=requests,
        lengths=LENGTHS[settings.kind],
        image_tokens=image_tokens,
        seed=settings.seed,
    )


def points(settings: ReplaySettings, *, image_tokens: int, capacity: float) -> Iterator[Point]:
    """All points of a sweep.

    Args:
      settings: that were checked.
      image_tokens: what an image takes of a prompt.
      capacity: requests a second that the device serves without adapters.

    Raises:
      ValueError: a file has no such traces.
    """
    if settings.trace is not None:
        yield from _points_of_file(settings, image_tokens)
        return
    loads = settings.loads or (() if settings.rates else DEFAULT_LOADS)
    paces = [(load, load * capacity) for load in loads] + [(None, r) for r in settings.rates]
    for adapters in settings.adapters:
        for spread, weights in _spreads(settings, adapters):

            def drawn(rate: float, weights: Sequence[float] = weights) -> list[Arrival]:
                return make_trace(
                    weights,
                    rate=rate,
                    requests=max(round(rate * settings.seconds), 1),
                    lengths=LENGTHS[settings.kind],
                    image_tokens=image_tokens,
                    cv=settings.cv,
                    seed=settings.seed,
                )

            point = functools.partial(Point, kind=settings.kind, adapters=adapters, spread=spread)
            for load, rate in paces:
                yield point(load=load, rate=rate, trace=drawn(rate))
            if settings.at_once:
                yield point(load=None, rate=None, trace=at_once(drawn(capacity)))


def adapters_of(settings: ReplaySettings) -> int:
    """How many adapters the traces name at most; raises what `points` raises."""
    if settings.trace is None:
        return max(settings.adapters)
    traces = _read(settings, IMAGE_TOKENS).values()
    numbers = [a.adapter for trace in traces for a in trace if a.adapter is not None]
    return max(numbers, default=0) + 1


def _spreads(settings: ReplaySettings, adapters: int) -> Iterator[tuple[str, list[float]]]:
    for share in settings.skews:
        yield f"skew {share:g}", skewed(adapters, share)
    for exponent in settings.zipf:
        yield f"zipf {exponent:g}", zipf(adapters, exponent)


def _points_of_file(settings: ReplaySettings, image_tokens: int) -> Iterator[Point]:
    assert settings.trace is not None
    for name, trace in _read(settings, image_tokens).items():
        numbers = [arrival.adapter for arrival in trace if arrival.adapter is not None]
        point = functools.partial(
            Point,
            kind=settings.trace.stem,
            adapters=max(numbers, default=-1) + 1,
            spread=name,
            load=None,
            from_file=True,
        )
        seconds = trace[-1].at_s
        yield point(rate=len(trace) / seconds if seconds else None, trace=trace)
        if settings.at_once and seconds:
            yield point(rate=None, trace=at_once(trace))


def _read(settings: ReplaySettings, image_tokens: int) -> dict[str, list[Arrival]]:
    """The traces that are asked for."""
    assert settings.trace is not None
    traces = read_traces(settings.trace, image_tokens=image_tokens)
    known = [name for name, trace in traces.items() if trace]
    if wrong := [name for name in settings.names if name not in known]:
        raise ValueError(f"{settings.trace} has no trace {wrong[0]!r}; known: {', '.join(known)}")
    if not known:
        raise ValueError(f"{settings.trace} holds no request")
    return {name: traces[name] for name in settings.names or known}
