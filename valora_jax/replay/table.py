"""The figures of a run on the screen."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from valora_jax.lora.mode import Mode
from valora_jax.replay.records import Record, trace_of

_COLUMNS = (
    "policy",
    "ms/token",
    "p99",
    "TTFT",
    "p99",
    "TPOT",
    "p99",
    "wait",
    "tok/s",
    "good/s",
    "un/mer/mix",
    "merges",
    "uploads",
)
_PIPE_WIDTH = 132  # of what is no terminal


def show(records: Sequence[Record], console: Console) -> None:
    """Prints a table for each trace, a line a policy; milliseconds are means."""
    if not console.is_terminal:
        console = Console(file=console.file, width=_PIPE_WIDTH)
    of_trace: dict[str, list[Record]] = {}
    for record in records:
        of_trace.setdefault(trace_of(record), []).append(record)
    for name, own in of_trace.items():
        console.print(_table(name, own))


def _table(name: str, records: Sequence[Record]) -> Table:
    simulated = any("simulator_error_percent" in record for record in records)
    title = f"{name}: {records[0]['requests'] + records[0]['unserved']} requests"
    table = Table(title=title, title_justify="left")
    for column in (*_COLUMNS, *(("simulated",) if simulated else ())):
        table.add_column(column, justify="left" if column == "policy" else "right")
    best_ms = min(r["token_ms"]["mean"] for r in records)
    for record in records:
        style = "bold" if record["token_ms"]["mean"] == best_ms else None
        cells = _cells(record)
        if simulated:
            cells.append(f"{record['simulator_error_percent']:+.1f} %")
        table.add_row(*cells, style=style)
    return table


def _cells(record: Record) -> list[str]:
    token_ms, first_ms, next_ms = (
        record[name] for name in ("token_ms", "first_token_ms", "next_token_ms")
    )
    busy_s = sum(record["mode_s"].values())
    shares = (record["mode_s"][mode.value] / max(busy_s, 1e-9) for mode in Mode)
    lost = record["interrupted"] + record["refused"]
    return [
        record["policy"],
        _number(token_ms["mean"]),
        _number(token_ms["p99"]),
        _number(first_ms["mean"]),
        _number(first_ms["p99"]),
        _number(next_ms and next_ms["mean"]),
        _number(next_ms and next_ms["p99"]),
        _number(record["wait_ms"]["mean"]),
        f"{record['tokens_per_s']:.0f}",
        f"{record['goodput_per_s']:.2f}",
        "/".join(f"{100 * share:.0f}" for share in shares) + " %",
        f"{record['switches']}" + (f" (-{lost})" if lost else ""),
        f"{record['uploads']}",
    ]


def _number(value: float | None) -> str:
    """Three digits or more."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
