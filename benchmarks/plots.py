"""Draws the results of the GPU benchmarks from their JSON lines, next to them.

Run it as `python -m benchmarks.plots`. Of records of one name the newest counts.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.floors import HBM_BYTES_PER_S, TENSOR_FLOPS_PER_S
from benchmarks.results import RESULTS

Record = Mapping[str, Any]

SQUARE = "lora/4096-4096"
STYLES = {  # implementation: (label, colour, marker)
    "triton": ("valora_jax", "#0b6e4f", "o"),
    "two-launches": ("valora_jax, two launches", "#66a61e", "o"),
    "fixed-tile": ("fixed tile 64x64x32", "#d95f02", "s"),
    "masked-dense": ("masked-dense", "#7570b3", "^"),
    "loop": ("per-adapter loop", "#e7298a", "v"),
    "gather-bmm": ("gather + bmm", "#a6761d", "D"),
    "xla": ("xla", "#666666", "x"),
}
FLOOR = dict(color="black", linestyle=":", linewidth=1)
ADAPTERS = {  # of a decode step: (label, colour)
    "none": ("no adapter", "#0b6e4f"),
    "one": ("one adapter", "#7570b3"),
    "each": ("one each", "#d95f02"),
}


def read(path: Path) -> list[Record]:
    """The newest record of each name that has a time; none if there is no file."""
    if not path.exists():
        return []
    records = map(json.loads, path.read_text().splitlines())
    newest = {record["name"]: record for record in records}
    return [record for record in newest.values() if "median_ms" in record]


def series(records: Iterable[Record], *, x: str, of: str) -> dict[str, list[Record]]:
    """Records by their field `of`, each list sorted by the field `x`."""
    by = defaultdict(list)
    for record in sorted(records, key=lambda record: record[x]):
        by[record[of]].append(record)
    return dict(by)


def latency(records: Sequence[Record]) -> Figure | None:
    """What LoRA adds to a linear against tokens, a panel for each number of adapters and rank."""
    of_square = [r for r in records if r.get("shape") == SQUARE and isinstance(r["rank"], int)]
    records = [r for r in of_square if r.get("added_ms", 0) > 0]  # of short runs there are none
    swept = [r for r in records if r["rank"] in (8, 64, 128) and r["adapters"] in (1, 8, 32)]
    if not swept:
        return None
    ranks, adapters = (sorted({r[field] for r in swept}) for field in ("rank", "adapters"))
    figure, panels = _panels(len(ranks), len(adapters))
    for row, rank in enumerate(ranks):
        for column, count in enumerate(adapters):
            panel = panels[row, column]
            own = [r for r in swept if (r["rank"], r["adapters"]) == (rank, count)]
            if not own:  # of a short run; a logarithmic axis needs values
                panel.set_axis_off()
                continue
            for impl, line in series(own, x="batch", of="impl").items():
                label, color, marker = STYLES[impl]
                _line(panel, line, "added_ms", color=color, marker=marker, label=label)
            floor = series(own, x="batch", of="impl").get("triton", [])
            _line(panel, floor, "added_floor_ms", label="byte floor", **FLOOR)
            panel.set_title(f"{count} adapter{'s' * (count > 1)} of rank {rank}", fontsize=9)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
    title = "What LoRA adds to a 4096 x 4096 linear"
    return _finish(figure, panels, "tokens", "microseconds", title)


def roofline(records: Sequence[Record]) -> Figure | None:
    """Products a second against products a byte, of our kernels under the device's roof."""
    ours = [r for r in records if r["impl"] in ("triton", "mosaic") and r["flops"]]
    if not ours:
        return None
    figure, panels = _panels(1, 1, width=7, height=5)
    panel = panels[0, 0]
    colors = {"lora": "#0b6e4f", "attention": "#7570b3", "merge": "#d95f02"}
    for op, own in series(ours, x="flops", of="op").items():
        panel.scatter(
            [r["flops"] / r["bytes"] for r in own],
            [r["flops"] / r["median_ms"] / 1e9 for r in own],
            s=18,
            color=colors[op],
            label=op,
        )
    intensity = np.geomspace(*_span(r["flops"] / r["bytes"] for r in ours))
    roof = np.minimum(intensity * HBM_BYTES_PER_S, TENSOR_FLOPS_PER_S) / 1e12
    panel.plot(intensity, roof, **FLOOR, label="3.0 TB/s and 989 TFLOP/s")
    panel.set_xscale("log")
    panel.set_yscale("log")
    return _finish(figure, panels, "FLOP a byte", "TFLOP/s", "Kernels under the roof")


def decode(records: Sequence[Record]) -> Figure | None:
    """A decode step against requests, with the byte floor of each curve."""
    steps = [r for r in records if r["op"] == "decode" and r["lora"] in ADAPTERS]
    if not steps:
        return None
    impls = [impl for impl in ("triton", "xla") if any(r["impl"] == impl for r in steps)]
    figure, panels = _panels(1, len(impls), width=5, height=4)
    for panel, impl in zip(panels[0], impls, strict=True):
        own = series((r for r in steps if r["impl"] == impl), x="batch", of="lora")
        for lora, line in own.items():
            label, color = ADAPTERS[lora]
            _line(panel, line, "median_ms", scale=1, color=color, marker="o", label=label)
            _line(panel, line, "floor_ms", scale=1, **FLOOR | {"color": color})
        panel.plot([], [], label="byte floors", **FLOOR)
        panel.set_title(STYLES[impl][0], fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
    return _finish(figure, panels, "requests", "milliseconds", _decode_title(steps))


def _decode_title(steps: Sequence[Record]) -> str:
    models, contexts = ({str(r[field]) for r in steps} for field in ("model", "kv_tokens"))
    return f"Decode step of {', '.join(models)}, {', '.join(contexts)} tokens each, rank 64"


def _panels(rows: int, columns: int, *, width: float = 3.6, height: float = 2.8):
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _line(panel: Axes, records: Sequence[Record], field: str, *, scale=1e3, **look) -> None:
    panel.plot(
        [r["batch"] for r in records],
        [r[field] * scale for r in records],
        **dict(linewidth=1.3, markersize=4) | look,
    )


def _span(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    return min(values) / 2, max(values) * 2


def _finish(figure: Figure, panels: np.ndarray, x: str, y: str, title: str) -> Figure:
    """Labels the outer axes; one legend for all panels."""
    labels = {}
    for panel in (panel for panel in panels.flat if panel.axison):
        panel.grid(alpha=0.3, linewidth=0.5)
        panel.xaxis.set_major_formatter("{x:g}")
        labels |= dict(zip(*panel.get_legend_handles_labels()[::-1], strict=True))
    for panel in panels[-1]:
        panel.set_xlabel(x)
    for panel in panels[:, 0]:
        panel.set_ylabel(y)
    figure.suptitle(title, fontsize=11)
    look = dict(loc="outside lower center", ncols=2 * panels.shape[1], fontsize=8)
    figure.legend(labels.values(), labels.keys(), **look)
    return figure


FIGURES: dict[str, tuple[str, Callable[[Sequence[Record]], Figure | None]]] = {
    "lora_latency": ("kernels", latency),
    "roofline": ("kernels", roofline),
    "decode_step": ("decode_step", decode),
}


def draw(folder: Path) -> list[Path]:
    """Writes every figure for which a device's folder has records; returns their files."""
    written = []
    for name, (bench, make) in FIGURES.items():
        if (figure := make(read(folder / f"{bench}.jsonl"))) is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=150)
            written.append(path)
    return written


def main() -> None:
    written = [path for folder in sorted(RESULTS.glob("*/")) for path in draw(folder)]
    if not written:
        raise SystemExit(
            f"no records of a GPU benchmark in {RESULTS}; run benchmarks.kernels first"
        )
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
