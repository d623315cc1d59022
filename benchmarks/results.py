"""Where figures go: JSON lines in benchmarks/results/<machine>/<bench>.jsonl, newest last."""

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_name() -> str:
    """The processor's own name, as Linux tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def device() -> str:
    return f"{cpu_name()}, {cores()} cores"


def results_file(bench: str, on: str | None = None) -> Path:
    """The file of a benchmark on a device, by default on this CPU, of which the cores count."""
    machine = re.sub(r"[^a-z0-9]+", "-", (on or device()).lower()).strip("-")
    return RESULTS / machine / f"{bench}.jsonl"


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
