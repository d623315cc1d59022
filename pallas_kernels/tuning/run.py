"""Fills a device's table of tiles: what `valora tune` does."""

import functools
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pallas_kernels.lora_matmul.candidates import HEIGHTS, Task
from pallas_kernels.lora_matmul.measure import DeviceLostError, Measurements
from pallas_kernels.lora_matmul.tune import Measure, is_done, key_of, search
from pallas_kernels.lora_matmul.tuned import KINDS
from pallas_kernels.tuning.search import mean_us
from pallas_kernels.tuning.shapes import MODELS
from pallas_kernels.tuning.table import Skipped, Table, path_of


def tune(
    *,
    models: Sequence[str] = (),
    output: Path | None = None,
    only: str = "",
    minutes: float = 25.0,
    show_progress: bool = True,
) -> Path:
    """Measures tiles on this machine's GPU and writes the best into its table.

    Shapes that the table has are not measured again, and it is written after each: a search that
    was interrupted goes on where it was. To measure anew, delete the file.

    Args:
      models: names of `shapes.MODELS`; all if there are none.
      output: the table; the package's own, which the kernels read, if None.
      only: a regular expression to be found in the names of the searches to make, such as
        "lora/4096-12288/t8/h16": input width, output columns, tokens, height of row tiles.
      minutes: no search begins after so many.
      show_progress: whether to show a bar on stderr.

    Returns:
      The file.

    Raises:
      NotImplementedError: jax runs on no GPU.
      ValueError: a model is unknown, or the expression is none.
      TableError: the file cannot be read, or is of another device.
      DeviceLostError: a tile has brought the device down; another start leaves it out.
    """
    if (platform := jax.default_backend()) != "gpu":
        raise NotImplementedError(
            f"tiles are measured on an NVIDIA GPU, but jax runs on {platform!r} here; on a machine "
            "that has one, install jax[cuda13] and unset JAX_PLATFORMS"
        )
    device = jax.devices()[0].device_kind
    path = output or path_of(device)
    table = Table(device=device, jax=jax.__version__, kinds=KINDS)
    if path.exists():
        table = Table.read(path, device=device, kinds=KINDS)
    console = Console(stderr=True, quiet=not show_progress)
    measurements = functools.lru_cache(maxsize=1)(Measurements)
    run(
        tasks(models, only=only),
        table,
        path,
        measure=lambda task, tiles: measurements(task.linear).of(task, tiles),
        until_s=time.monotonic() + 60 * minutes,
        console=console,
    )
    return path


def tasks(models: Sequence[str], *, only: str = "") -> list[Task]:
    """The searches for models, each once: what matters most first."""
    if unknown := sorted(set(models) - MODELS.keys()):
        raise ValueError(f"unknown models: {', '.join(unknown)}; known: {', '.join(MODELS)}")
    try:
        wanted = re.compile(only)
    except re.error as error:
        raise ValueError(f"{only!r} is no regular expression: {error}") from error
    found = [
        Task(linear=linear, tokens=tokens, block_rows=height)
        for model in models or MODELS
        for tokens, heights in HEIGHTS.items()
        for linear in MODELS[model].linears.values()
        for height in heights
    ]
    # Searches of one name share an entry of the table.
    return list({task.name: task for task in found if wanted.search(task.name)}.values())


def run(
    searches: Iterable[Task],
    table: Table,
    path: Path,
    *,
    measure: Measure,
    until_s: float,
    console: Console,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Makes those searches that the table lacks, and writes it after each; see `tune`.

    No search begins once `clock()` has reached `until_s`.
    """
    todo = [task for task in searches if not is_done(task, table)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        shown = bar.add_task("", total=len(todo))
        for done, task in enumerate(todo):
            if clock() >= until_s:
                bar.console.print(f"time is up; {len(todo) - done} searches are left")
                break
            bar.update(shown, description=task.name)
            try:
                outcomes = search(task, table, measure)
            except DeviceLostError as lost:
                table.skipped.append(Skipped(key=key_of(task), tile=lost.tile, reason=lost.reason))
                table.write(path)
                raise
            table.jax = jax.__version__
            table.write(path)
            bar.console.print(_line(task, table, list(map(mean_us, outcomes.values()))))
            bar.advance(shown)
    console.print(f"{len(table.entries)} entries in {path}")


def _line(task: Task, table: Table, us: Sequence[float]) -> str:
    """What a search gained over where it began."""
    if not is_done(task, table):
        return f"{task.name}: no tile works"
    return f"{task.name}: {us[0]:.1f} -> {min(us):.1f} µs, of {len(us)} tiles"
