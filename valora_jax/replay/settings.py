"""What `valora bench replay` is told: on what, which traces, under which policies."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from valora_jax.config import EngineConfig, PolicyName
from valora_jax.replay.report import Slo

Shapes = Literal["llava-1.5-7b", "llava-1.5-13b"]
Kind = Literal["retrieval", "video"]
Targets = Literal["all", "attention"]

POLICIES: tuple[PolicyName, ...] = ("valora", "unmerged", "merged", "dlora")
# No prefix cache: a replay must not profit from the one before it.
ENGINE = EngineConfig(max_requests=32, prefix_cache=False)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReplaySettings:
    """Replay request traces through an engine, or through its cost model, and report latencies."""

    model: Path | None = None
    """A checkpoint folder to serve."""
    shapes: Shapes | None = None
    """Serve random weights of this model's size instead, made on the device."""
    simulate: bool = False
    """Run the cost model of LLaVA-1.5-7B on an H100 instead: no GPU, seconds instead of minutes."""

    kind: Kind = "retrieval"
    """Requests to draw: "retrieval" is an image and about 200 tokens in, about 200 out; "video" is
    6 images in, 5 to 10 tokens out."""
    adapters: tuple[int, ...] = (16,)
    """Numbers of adapters; each is a set of traces."""
    skews: tuple[float, ...] = (0.8,)
    """Shares of the requests that the first adapter gets, the others alike; each is a set of
    traces. 0 is an equal share."""
    zipf: tuple[float, ...] = ()
    """Zipf exponents: further sets of traces, in which adapter i gets a share of i ** -exponent."""
    loads: tuple[float, ...] = ()
    """Rates of arrival, in units of what the device serves without adapters."""
    capacity: float | None = None
    """What it serves, in requests a second, so that several runs have the same rates. None finds it
    out."""
    rates: tuple[float, ...] = ()
    """Rates of arrival in requests a second. Where no rate and no load is given, loads are 0.3, 0.6
    and 0.8."""
    at_once: bool = False
    """Also offer all requests of each trace at the start, for the throughput."""
    seconds: float = 20.0
    """How long requests keep coming."""
    cv: float = 1.0
    """Standard deviation of the gaps between requests, in units of their mean. 1 is Poisson."""
    seed: int = 0
    """Of traces; equal seeds give equal requests."""

    trace: Path | None = None
    """A file of traces to replay instead of drawing some; docs/replay.md has its form."""
    names: tuple[str, ...] = ()
    """Which of the file's traces; all where none is named."""

    ranks: tuple[int, ...] = (64,)
    """Ranks of the adapters, in turn."""
    targets: Targets = "all"
    """Linears of the decoder that adapters change; "attention" is q, k, v and o."""
    resident: int | None = None
    """Adapters that the device holds at once; None is all of them, as always with --simulate."""

    policies: tuple[PolicyName, ...] = POLICIES
    """Policies to compare, each on every trace."""
    bound: bool = True
    """Also replay each trace without adapters, which no policy can beat."""
    slo: Slo = dataclasses.field(default_factory=Slo)
    output: Path | None = None
    """Append a line of JSON for each replay to this file."""
    plots: Path | None = None
    """Draw latencies and timelines into this folder."""
    engine: EngineConfig = ENGINE

    def check(self) -> None:
        """Raises ValueError with every fault, before anything is started."""
        if faults := list(self._faults()):
            raise ValueError("\n  ".join(["the flags do not go together:", *faults]))

    def _faults(self) -> Iterator[str]:
        if (self.model is not None) + (self.shapes is not None) + self.simulate != 1:
            yield "give one of --model, --shapes and --simulate"
        if self.trace is None and self.names:
            yield "--names are of the traces in a file; give --trace FILE"
        if self.trace is not None and (self.loads or self.rates):
            yield "the traces of --trace have their own rates; leave out --loads and --rates"
        if not self.policies and not self.bound:
            yield "nothing to replay: give --policies, or leave out --no-bound"
        if not self.skews and not self.zipf:
            yield "no share of requests for adapters: give --skews or --zipf"
        positive = {
            "adapters": self.adapters,
            "loads": self.loads,
            "rates": self.rates,
            "ranks": self.ranks,
            "seconds": (self.seconds,),
            "cv": (self.cv,),
            "capacity": () if self.capacity is None else (self.capacity,),
            "resident": () if self.resident is None else (self.resident,),
        }
        for flag, values in positive.items():
            if wrong := [value for value in values if not 0 < value < math.inf]:
                yield f"--{flag} {wrong[0]} must be positive and finite"
        for flag, needed in {"adapters": self.adapters, "ranks": self.ranks}.items():
            if not needed:
                yield f"--{flag} needs at least one number"
        if wrong := [skew for skew in self.skews if not 0 <= skew <= 1]:
            yield f"--skews {wrong[0]} is no share; give one in [0, 1]"
        for flag, values in {"zipf": self.zipf, "seed": (self.seed,)}.items():
            if wrong := [value for value in values if not 0 <= value < math.inf]:
                yield f"--{flag} {wrong[0]} must be 0 or more, and finite"
        if self.simulate:
            endless = {
                "resident": (self.resident, "adapter slots"),
                "engine.kv-pages": (self.engine.kv_pages, "key-value pages"),
            }
            for flag, (value, what) in endless.items():
                if value is not None:
                    yield f"--{flag} {value}: {what} do not run out with --simulate; leave it out"
        if self.engine.max_adapters < 1:
            yield "--engine.max-adapters 0 serves no adapters; leave it out, it follows --adapters"
