"""Draws records of replays: latency against rate, and modes over time. Needs matplotlib."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from valora_jax.lora.mode import Mode
from valora_jax.replay.records import BOUND, Record, trace_of

_POLICIES = {  # policy: (colour, marker)
    "valora": ("#0b6e4f", "o"),
    "unmerged": ("#d95f02", "s"),
    "merged": ("#7570b3", "^"),
    "dlora": ("#a6761d", "D"),
}
_BOUND = dict(color="black", linestyle=":", marker=".")
_MODES = {Mode.UNMERGED: "#d9d9d9", Mode.MERGED: "#0b6e4f", Mode.MIXTURE: "#f0a202"}
_MOST_COLUMNS = 4
_LINEAR_UP_TO = 5


def require_matplotlib() -> None:
    """Raises ModuleNotFoundError with the way out; before a replay that takes minutes."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "plots need matplotlib, which is not installed: install it, or keep the records with "
            "--output FILE and draw them where it is, with `valora bench plot FILE FOLDER`"
        )


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Writes `latency.png`, and a timeline for each trace; returns the files.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
      ValueError: there is no record.
    """
    require_matplotlib()
    if not records:
        raise ValueError("there is no record to draw; run `valora bench replay --output FILE`")
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    if any(record["rate"] is not None for record in records):
        figures["latency"] = _latency(records)
    by_trace: dict[str, list[Record]] = {}
    for record in records:
        by_trace.setdefault(trace_of(record), []).append(record)
    for name, own in by_trace.items():
        figures["timeline-" + re.sub(r"[^a-zA-Z0-9.]+", "-", name)] = _timeline(name, own)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def _latency(records: Sequence[Record]) -> Any:
    """Mean time a token against rate, a panel for each set of traces and a line for each policy."""
    by_set: dict[str, list[Record]] = {}
    for record in records:
        if record["rate"] is not None:
            by_set.setdefault(record["series"], []).append(record)
    columns = min(len(by_set), _MOST_COLUMNS)
    rows = -(-len(by_set) // columns)
    figure, panels = _panels(rows, columns, width=3.8, height=3.0)
    for panel in panels.flat[len(by_set) :]:
        panel.set_axis_off()
    for panel, (title, own) in zip(panels.flat, by_set.items(), strict=False):
        for policy in (BOUND, *_POLICIES):
            line = sorted((r for r in own if r["policy"] == policy), key=lambda r: r["rate"])
            if not line:
                continue
            color, marker = _POLICIES.get(policy, ("", ""))
            # Ours on top: where adapters are alike, others do the same.
            look = dict(color=color, marker=marker, zorder=3 if policy == "valora" else 2)
            look = _BOUND if policy == BOUND else look
            panel.plot(
                [r["rate"] for r in line],
                [r["token_ms"]["mean"] for r in line],
                label=policy,
                **dict(linewidth=1.3, markersize=4) | look,
            )
        panel.set_title(title, fontsize=7)
        _scale(panel, [r["token_ms"]["mean"] for r in own])
        panel.tick_params(which="both", labelsize=7)
        panel.grid(which="both", alpha=0.3, linewidth=0.5)
    _finish(figure, panels, "requests a second", "mean ms an output token", _title(records))
    return figure


def _scale(panel: Any, values: Sequence[float]) -> None:
    """From zero, or logarithmic where a policy is many times as slow as another."""
    if max(values) < _LINEAR_UP_TO * min(values):
        panel.set_ylim(0, 1.1 * max(values))
        return
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")


def _timeline(name: str, records: Sequence[Record]) -> Any:
    """Modes of the steps over time, with the requests that run and wait; a panel a policy."""
    figure, panels = _panels(len(records), 1, width=9, height=1.7)
    end_s = max(r["timeline"]["bin_s"] * len(r["timeline"]["running"]) for r in records)
    for panel, record in zip(panels[:, 0], records, strict=True):
        timeline = record["timeline"]
        bins = len(timeline["running"])
        times = [(i + 0.5) * timeline["bin_s"] for i in range(bins)]
        panel.stackplot(
            times,
            [timeline["modes"][mode.value] for mode in _MODES],
            colors=_MODES.values(),
            labels=[mode.value for mode in _MODES],
            step="mid",
            linewidth=0,
        )
        panel.set_ylim(0, 1)
        panel.set_xlim(0, end_s)
        panel.set_title(record["policy"], fontsize=9, loc="left")
        panel.tick_params(labelsize=7)
        requests = panel.twinx()
        requests.plot(times, timeline["running"], color="black", linewidth=1.1, label="running")
        requests.plot(times, timeline["waiting"], color="#c1121f", linewidth=1.1, label="waiting")
        requests.set_ylim(bottom=0)
        requests.tick_params(labelsize=7)
        requests.set_ylabel("requests", fontsize=8)
        panel.plot([], [], color="black", linewidth=1.1, label="requests running")
        panel.plot([], [], color="#c1121f", linewidth=1.1, label="waiting")
    _finish(figure, panels, "seconds", "share of time", name)
    return figure


def _title(records: Sequence[Record]) -> str:
    models, devices = ({r[field] for r in records} for field in ("model", "device"))
    return f"{', '.join(sorted(models))} on {', '.join(sorted(devices))}"


def _panels(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, Any]:
    # Late: only those who draw need it. No pyplot, so that no display is looked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows + 0.8), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _finish(figure: Any, panels: Any, x: str, y: str, title: str) -> None:
    """Labels the outer axes; one legend for all panels."""
    labels = {}
    for panel in panels.flat:
        labels |= dict(zip(*panel.get_legend_handles_labels()[::-1], strict=True))
    for panel in panels[-1]:
        panel.set_xlabel(x)
    for panel in panels[:, 0]:
        panel.set_ylabel(y, fontsize=8)
    figure.suptitle(title, fontsize=11)
    columns = 3 * panels.shape[1] if figure.get_figwidth() < 9 else 6
    look = dict(loc="outside lower center", ncols=columns, fontsize=8)
    figure.legend(labels.values(), labels.keys(), **look)
