"""Results of replays as lines of JSON, one a replay, newest last."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from valora_jax.replay.outcome import Outcome
from valora_jax.replay.points import Point
from valora_jax.replay.report import report
from valora_jax.replay.settings import ReplaySettings
from valora_jax.replay.timeline import timeline

Record = Mapping[str, Any]

BOUND = "no adapters"  # in place of a policy


def record_of(
    point: Point,
    policy: str,
    outcome: Outcome,
    *,
    predicted: Outcome | None,
    settings: ReplaySettings,
    device: str,
    command: str,
) -> Record:
    """One line.

    Args:
      point: what was replayed.
      policy: its name, or `BOUND`.
      outcome: what became of it.
      predicted: the simulation of the same trace from what the engine had learnt; None if the
        replay is a simulation itself.
      settings: of the run.
      device: what the figures are of.
      command: what was run.
    """
    figures = report(outcome, settings.slo)
    simulated: dict[str, float] = {}
    if predicted is not None:
        simulated_ms = report(predicted, settings.slo).token_ms.mean
        error_percent = 100 * (simulated_ms / figures.token_ms.mean - 1)
        simulated = {"simulated_token_ms": simulated_ms, "simulator_error_percent": error_percent}
    return {
        "bench": "replay",
        "name": f"{_trace_name(point, settings)}/{policy.replace(' ', '-')}",
        "series": _series(point, settings),
        "model": _model(settings),
        "simulated": settings.simulate,
        "kind": point.kind,
        "adapters": point.adapters,
        "spread": point.spread,
        "load": point.load,
        "rate": point.rate,
        "policy": policy,
        "ranks": settings.ranks,
        "targets": settings.targets,
        "resident": settings.resident,
        "cv": settings.cv,
        "seed": settings.seed,
        "seconds_asked": settings.seconds,
        "merge": settings.engine.merge,
        "max_requests": settings.engine.max_requests,
        "max_wait_s": settings.engine.max_wait_s,
        "slo": dataclasses.asdict(settings.slo),
        **dataclasses.asdict(figures),
        **simulated,
        "timeline": dataclasses.asdict(timeline(outcome)),
        "device": device,
        "jax": metadata.version("jax"),
        "command": command,
    }


def trace_of(record: Record) -> str:
    """The name of what was replayed; records of other policies share it."""
    return record["name"].rpartition("/")[0]


def _trace_name(point: Point, settings: ReplaySettings) -> str:
    parts = (
        ("simulated-" if settings.simulate else "") + _model(settings),
        point.kind,
        f"a{point.adapters}",
        "r" + "-".join(map(str, settings.ranks)),
        settings.targets,
        point.spread,
        point.pace,
        *_differences(settings),
    )
    return "/".join(parts).replace(" ", "-")


def _series(point: Point, settings: ReplaySettings) -> str:
    """What a trace shares with those that differ in their rate alone."""
    ranks = ", ".join(map(str, settings.ranks))
    where = "" if settings.targets == "all" else " on q, k, v, o"
    of = ", ".join(
        [f"{point.kind}, {point.adapters} adapters of rank {ranks}{where}", *_differences(settings)]
    )
    return of if point.from_file else f"{of}, {point.spread}"


def _differences(settings: ReplaySettings) -> list[str]:
    """Other settings that change the figures, where they are not the defaults."""
    usual = ReplaySettings()
    pairs = [(name, settings, usual) for name in ("resident", "cv", "seed")]
    of_engine = ("max_requests", "max_wait_s", "merge")
    pairs += [(name, settings.engine, usual.engine) for name in of_engine]
    return [
        f"{name.replace('_', ' ')} {getattr(own, name)}"
        for name, own, default in pairs
        if getattr(own, name) != getattr(default, name)
    ]


def _model(settings: ReplaySettings) -> str:
    return settings.model.name if settings.model else settings.shapes or "llava-1.5-7b"


def append(path: Path, records: Iterable[Record]) -> None:
    """Adds lines to a file, which is made with its folder if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read(path: Path) -> list[Record]:
    """The newest record of each name.

    Raises:
      ValueError: a line is no record of a replay.
      OSError: the file cannot be read.
    """
    newest = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            newest[record["name"]] = record
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number} is no record of a replay: {error}") from error
    return list(newest.values())
