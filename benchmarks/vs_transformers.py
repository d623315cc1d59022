"""Throughput and latency against transformers + PEFT, on the same CPU, in alternation.

Run it as `.venv/bin/python -m benchmarks.vs_transformers`. Each contestant is one side in one
dtype, in a process of its own; all take their turns in every round, on images that no cache has
seen, and the median counts. In float32 both sides must give the same greedy tokens.
"""

import contextlib
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.child import Child
from benchmarks.hf_environment import ensure_hf_python
from benchmarks.results import append, cores, device, results_file
from benchmarks.workload import Request, make_round
from valora_jax.demo import ensure_demo_checkpoint
from valora_jax.demo.random_adapter import write_random_adapter

RANKS = {"rank8a": 8, "rank8b": 8, "rank16": 16, "rank64": 64}
NEW_TOKENS = 32
REQUESTS = 16
BENCHES = {  # name: (requests, the adapters they take in turn)
    "throughput": (REQUESTS, tuple(RANKS)),
    "latency": (1, ("rank16",)),
    "latency_base": (1, (None,)),
}
# How transformers may batch the 16 requests; the quickest in the warm-up is measured.
HF_BATCHING = (
    {"batch": 16, "mixed": True},
    {"batch": 4, "mixed": False},
)
# Waiting threads sleep instead of spinning: torch's threads lose up to ten times their speed to any
# other process on the machine otherwise.
HF_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Attributes:
    rounds: measured rounds after the warm-up; the median counts.
    hf_python: an interpreter that has requirements-hf.txt; None makes `.venv-hf`.
    dtypes: of valora_jax; "auto" is its default.
    hf_dtypes: of transformers.
    model: a LLaVA-1.5 checkpoint; None is the demo model.
    """

    rounds: int = 3
    hf_python: Path | None = None
    dtypes: tuple[str, ...] = ("auto", "float32")
    hf_dtypes: tuple[str, ...] = ("float32", "bfloat16")
    model: Path | None = None


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class Contestant:
    """One side in one dtype; `answers` and `options` are by bench."""

    side: str
    dtype: str
    child: Child
    versions: dict[str, str]
    options: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    answers: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)

    def run(self, bench: str, requests: Sequence[Request]) -> dict[str, Any]:
        return self.child.ask(
            "run",
            requests=[r.as_json() for r in requests],
            new_tokens=NEW_TOKENS,
            **self.options.get(bench, {}),
        )

    def measure(self, bench: str, requests: Sequence[Request]) -> None:
        self.answers.setdefault(bench, []).append(self.run(bench, requests))

    def warm_up(self, rounds: Mapping[str, Sequence[Sequence[Request]]]) -> None:
        """Runs every bench, and settles on the quickest batching where there are several."""
        for bench, (count, _) in BENCHES.items():
            if self.side == "valora_jax":
                tried: Sequence[dict[str, Any]] = ({},)
            else:
                tried = HF_BATCHING if count > 1 else ({"batch": 1, "mixed": False},)
            seconds = []
            for options in tried:
                self.options[bench] = options
                seconds.append(min(self.run(bench, r)["seconds"] for r in rounds[bench]))
            self.options[bench] = tried[seconds.index(min(seconds))]

    def median(self, bench: str, field: str = "seconds") -> float:
        return statistics.median(answer[field] for answer in self.answers[bench])


def main(config: Config) -> None:
    console = Console()
    model = config.model or ensure_demo_checkpoint()
    with (
        tempfile.TemporaryDirectory(prefix="vs_transformers-") as work,
        contextlib.ExitStack() as s,
    ):
        folder = Path(work)
        adapters = {
            name: str(write_random_adapter(folder / name, model=model, rank=rank, seed=i))
            for i, (name, rank) in enumerate(RANKS.items())
        }
        contestants = [
            start(side, dtype, model, adapters, config, stack=s, folder=folder)
            for side, dtypes in (("valora_jax", config.dtypes), ("transformers", config.hf_dtypes))
            for dtype in dtypes
        ]
        compete(contestants, model=model, folder=folder, rounds=config.rounds, console=console)
    records = [record(c, bench, model.name) for bench in BENCHES for c in contestants]
    path = results_file("vs_transformers")
    append(path, records)
    report(contestants, console=console)
    console.print(f"{device()}; figures in {path}")


def start(
    side: str,
    dtype: str,
    model: Path,
    adapters: Mapping[str, str],
    config: Config,
    *,
    stack: contextlib.ExitStack,
    folder: Path,
) -> Contestant:
    """Starts a contestant's process and loads the model and the adapters in it."""
    log = folder / f"{side}-{dtype}.log"
    if side == "valora_jax":
        command, extra = [sys.executable, "-m", "benchmarks.valora_side"], {}
        child = stack.enter_context(Child(command, log=log))
    else:
        python, script = (
            config.hf_python or ensure_hf_python(),
            Path(__file__).parent / "hf_side.py",
        )
        child = Child([str(python), str(script)], log=log, environment=HF_ENVIRONMENT)
        child, extra = stack.enter_context(child), {"threads": cores()}
    answer = child.ask("load", model=str(model), dtype=dtype, adapters=dict(adapters), **extra)
    return Contestant(side=side, dtype=dtype, child=child, versions=answer["versions"])


def compete(
    contestants: Sequence[Contestant], *, model: Path, folder: Path, rounds: int, console: Console
) -> None:
    """Warms everybody up, then lets all run every bench in each round, first come last next."""

    def make(index: int, bench: str) -> list[Request]:
        count, adapters = BENCHES[bench]
        index = len(BENCHES) * index + list(BENCHES).index(bench)
        return make_round(folder, model=model, index=index, count=count, adapters=adapters)

    warm_up = {bench: [make(0, bench), make(1, bench)] for bench in BENCHES}
    for contestant in contestants:
        with console.status(f"warming up {contestant.side} in {contestant.dtype}"):
            contestant.warm_up(warm_up)
    for index in range(rounds):
        for bench in BENCHES:
            requests = make(2 + index, bench)
            order = contestants if index % 2 == 0 else contestants[::-1]
            for c in order:
                with console.status(f"round {index + 1} of {rounds}: {bench}, {c.side} {c.dtype}"):
                    c.measure(bench, requests)


def record(contestant: Contestant, bench: str, model: str) -> dict[str, Any]:
    """A line of the results file."""
    count, adapters = BENCHES[bench]
    seconds = contestant.median(bench)
    return {
        "bench": bench,
        "model": model,
        "side": contestant.side,
        "dtype": contestant.dtype,
        "requests": count,
        "adapters": {name: RANKS[name] for name in adapters if name is not None},
        "new_tokens": NEW_TOKENS,
        "tokens_per_s": count * NEW_TOKENS / seconds,
        "latency_s": seconds,
        "first_token_s": contestant.median(bench, "first_token_s"),
        "cpu_s": contestant.median(bench, "cpu_s"),
        "rounds_s": [answer["seconds"] for answer in contestant.answers[bench]],
        "options": contestant.options[bench],
        "device": device(),
        "versions": contestant.versions,
        "command": " ".join(["python", "-m", "benchmarks.vs_transformers", *sys.argv[1:]]),
    }


def equal_fraction(ours: Sequence[Mapping], theirs: Sequence[Mapping]) -> float:
    """Share of equal tokens over all rounds, at equal positions of equal requests."""
    pairs = [
        pair
        for a, b in zip(ours, theirs, strict=True)
        for row_a, row_b in zip(a["tokens"], b["tokens"], strict=True)
        for pair in zip(row_a, row_b, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def report(contestants: Sequence[Contestant], *, console: Console) -> None:
    """Prints a table of medians and the ratios of each side's best."""
    table = Table("bench", "side", "dtype", "seconds", "first token", "CPU s", "tokens/s")
    for bench, (count, _) in BENCHES.items():
        for c in contestants:
            values = [c.median(bench, f) for f in ("seconds", "first_token_s", "cpu_s")]
            speed = count * NEW_TOKENS / values[0]
            table.add_row(bench, c.side, c.dtype, *(f"{v:.2f}" for v in values), f"{speed:.1f}")
        table.add_section()
    console.print(table)
    sides = {
        side: [c for c in contestants if c.side == side] for side in ("valora_jax", "transformers")
    }
    for bench, (count, _) in BENCHES.items():
        ours, theirs = (min(c.median(bench) for c in side) for side in sides.values())
        if count > 1:
            console.print(f"{bench}: {theirs / ours:.2f}x theirs (higher is better)")
        else:
            console.print(f"{bench}: {ours / theirs:.2f}x theirs (lower is better)")
    in_float32 = [c for c in contestants if c.dtype == "float32"]
    if len(in_float32) == 2:
        for bench in BENCHES:
            share = equal_fraction(*(c.answers[bench] for c in in_float32))
            console.print(f"{bench}: {share:.1%} of the greedy tokens are equal in float32")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
