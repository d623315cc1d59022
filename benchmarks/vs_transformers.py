"""Throughput and latency against transformers + PEFT, on the same CPU, in alternation.

Run it as `.venv/bin/python -m benchmarks.vs_transformers`. Each contestant is one side in one
variant, in a process of its own; all take their turns in every round, on images that no cache has
seen, and the median counts. In float32 both sides must give the same greedy tokens.
"""

import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
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

SIDES = ("valora_jax", "transformers")
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
# How torch's threads wait for each other, both measured: spinning, OpenMP's default, is up to 1.5
# times as fast on an idle machine, and many times slower where another process takes a core.
HF_WAITING = {"spin": {}, "sleep": {"OMP_WAIT_POLICY": "passive"}}
HF_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


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
    """One side in one variant.

    Attributes:
      side: "valora_jax" or "transformers".
      waiting: a key of `HF_WAITING`; None on our side.
      versions: of the side's packages.
      options: by bench, how requests are batched.
      answers: by bench, one a round.
    """

    side: str
    dtype: str
    waiting: str | None = None
    child: Child
    versions: dict[str, str]
    options: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    answers: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.side, self.dtype, self.waiting)))

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

    def best(self, bench: str) -> float:
        return min(answer["seconds"] for answer in self.answers[bench])


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
        variants = [("valora_jax", dtype, None) for dtype in config.dtypes]
        variants += [("transformers", d, w) for d in config.hf_dtypes for w in HF_WAITING]
        contestants = []
        for side, dtype, waiting in variants:
            log = folder / f"{side}-{dtype}-{waiting}.log"
            child = s.enter_context(start(side, waiting, config, log=log))
            contestants.append(load(child, side, dtype, waiting, model=model, adapters=adapters))
        compete(contestants, model=model, folder=folder, rounds=config.rounds, console=console)
    records = [record(c, bench, model.name) for bench in BENCHES for c in contestants]
    path = results_file("vs_transformers")
    append(path, records)
    report(contestants, console=console)
    console.print(f"{device()}; figures in {path}")


def start(side: str, waiting: str | None, config: Config, *, log: Path) -> Child:
    """Starts the process of a side."""
    if waiting is None:
        return Child([sys.executable, "-m", "benchmarks.valora_side"], log=log)
    # Not resolved: an environment's interpreter is a link, and the link says which environment.
    python = config.hf_python.absolute() if config.hf_python else ensure_hf_python()
    script = Path(__file__).parent / "hf_side.py"
    environment = HF_ENVIRONMENT | HF_WAITING[waiting]
    # -P: no module beside the script, such as kernels.py, takes the place of an installed one.
    return Child([str(python), "-P", str(script)], log=log, environment=environment)


def load(
    child: Child,
    side: str,
    dtype: str,
    waiting: str | None,
    *,
    model: Path,
    adapters: Mapping[str, str],
) -> Contestant:
    """Loads the model and the adapters in a side's process."""
    threads = {} if waiting is None else {"threads": cores()}
    answer = child.ask("load", model=str(model), dtype=dtype, adapters=dict(adapters), **threads)
    return Contestant(
        side=side, dtype=dtype, waiting=waiting, child=child, versions=answer["versions"]
    )


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
        with console.status(f"warming up {contestant}"):
            contestant.warm_up(warm_up)
    for index in range(rounds):
        for bench in BENCHES:
            requests = make(2 + index, bench)
            order = contestants if index % 2 == 0 else contestants[::-1]
            for c in order:
                with console.status(f"round {index + 1} of {rounds}: {bench}, {c}"):
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
        "waiting": contestant.waiting,
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
        "load_average": os.getloadavg()[-1],
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
    """Prints medians, the ratios of each side's quickest, and the share of equal tokens."""
    table = Table("bench", "contestant", "seconds", "best", "first token", "CPU s", "tokens/s")
    for bench, (count, _) in BENCHES.items():
        for c in contestants:
            values = [c.median(bench), c.best(bench)]
            values += [c.median(bench, field) for field in ("first_token_s", "cpu_s")]
            speed = count * NEW_TOKENS / values[0]
            table.add_row(bench, str(c), *(f"{v:.2f}" for v in values), f"{speed:.1f}")
        table.add_section()
    console.print(table)
    for bench in BENCHES:
        console.print(
            f"{bench}: {ratio(contestants, bench, Contestant.median)} by medians, "
            f"{ratio(contestants, bench, Contestant.best)} by best rounds"
        )
    in_float32 = [c for c in contestants if c.dtype == "float32"]
    ours, theirs = (next((c for c in in_float32 if c.side == side), None) for side in SIDES)
    if ours and theirs:
        for bench in BENCHES:
            share = equal_fraction(ours.answers[bench], theirs.answers[bench])
            console.print(f"{bench}: {share:.1%} of the greedy tokens are equal in float32")


def ratio(
    contestants: Sequence[Contestant], bench: str, seconds: Callable[[Contestant, str], float]
) -> str:
    """Our quickest contestant beside theirs, in words."""
    ours, theirs = (min(seconds(c, bench) for c in contestants if c.side == side) for side in SIDES)
    if BENCHES[bench][0] > 1:
        return f"{theirs / ours:.2f}x their throughput"
    return f"{ours / theirs:.2f}x their latency"


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
