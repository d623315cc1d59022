"""Fills a device's table of tiles: what `valora tune` does."""

import collections
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pallas_kernels.lora_matmul.candidates import RARE_STEPS, STEPS, Task
from pallas_kernels.lora_matmul.measure import DeviceLostError, Measurements
from pallas_kernels.lora_matmul.tune import is_done, key_of, search
from pallas_kernels.lora_matmul.tuned import KINDS
from pallas_kernels.tuning.compilers import Compilers
from pallas_kernels.tuning.search import Outcome, mean_us
from pallas_kernels.tuning.shapes import MODELS
from pallas_kernels.tuning.table import Skipped, Table, path_of

# While the tiles of one search are timed, those of the others are compiled.
AT_ONCE = 3


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
        "lora/4096-12288/t512/h64": operator, input width, output columns, tokens, height of row
        tiles.
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
    with Compilers() as compilers:
        run(
            tasks(models, only=only),
            table,
            path,
            measure=lambda task: Measurements(task, compilers),
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
        Task(op=op, linear=linear, tokens=tokens, block_rows=height)
        for nth, model in enumerate(models or MODELS)
        for op, tokens, heights in (STEPS + RARE_STEPS if nth == 0 else STEPS)
        for height in heights
        for linear in MODELS[model].linears.values()
    ]
    # Searches of one name share an entry of the table.
    return list({task.name: task for task in found if wanted.search(task.name)}.values())


class Measure(Protocol):
    """What `measure.Measurements` does for a search."""

    def start(self, tiles: Sequence[Any]) -> None: ...

    def finish(self) -> Mapping[Any, Outcome]: ...


class _Search:
    """A search that waits for its tiles to be compiled."""

    def __init__(self, task: Task, table: Table, measure: Callable[[Task], Measure]):
        self.task, self.outcomes = task, {}
        self._rounds, self._measure = search(task, table), measure
        self._measurements: Measure | None = None
        self.is_over = not self._next(None)

    def turn(self) -> None:
        """Waits, takes times, and has the next tiles compiled."""
        assert self._measurements is not None
        self.is_over = not self._next(self._measurements.finish())

    def _next(self, outcomes: Mapping[Any, Outcome] | None) -> bool:
        try:
            tiles = self._rounds.send(outcomes)  # pyright: ignore[reportArgumentType]
        except StopIteration as end:
            self.outcomes = end.value
            self._measurements = None  # and with them what they have on the device
            return False
        if self._measurements is None:
            self._measurements = self._measure(self.task)
        self._measurements.start(tiles)
        return True


def run(
    searches: Iterable[Task],
    table: Table,
    path: Path,
    *,
    measure: Callable[[Task], Measure],
    until_s: float,
    console: Console,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Makes those searches that the table lacks, and writes it after each; see `tune`.

    Some take turns: while the tiles of one are timed, those of the others are compiled. No search
    begins once `clock()` has reached `until_s`.
    """
    began_s = clock()
    waiting = collections.deque(task for task in searches if not is_done(task, table))
    active: collections.deque[_Search] = collections.deque()
    ended: list[_Search] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        shown = bar.add_task("", total=len(waiting))
        while waiting or active:
            while waiting and len(active) < AT_ONCE and clock() < until_s:
                if is_done(task := waiting.popleft(), table):  # by what others have found
                    bar.advance(shown)
                else:
                    active.append(_Search(task, table, measure))
            if not active:
                if waiting:
                    bar.console.print(f"time is up; {len(waiting)} searches are left")
                break
            current = active.popleft()
            bar.update(shown, description=current.task.name)
            if not current.is_over:
                _take_turn(current, table, path)
                active.append(current)
                continue
            table.jax = jax.__version__
            table.write(path)
            bar.console.print(_line(current, table))
            bar.advance(shown)
            ended.append(current)
    console.print(f"{_summary(ended)} in {clock() - began_s:.0f} s")
    console.print(f"{len(table.entries)} entries in {path}")


def _take_turn(current: _Search, table: Table, path: Path) -> None:
    try:
        current.turn()
    except DeviceLostError as lost:
        key = key_of(current.task)
        table.skipped.append(Skipped(key=key, tile=lost.tile, reason=lost.reason))
        table.write(path)
        raise


def _line(ended: _Search, table: Table) -> str:
    """What a search gained over where it began."""
    us = list(map(mean_us, ended.outcomes.values()))
    if not is_done(ended.task, table):
        return f"{ended.task.name}: no tile works"
    return f"{ended.task.name}: {us[0]:.1f} -> {min(us):.1f} µs, of {len(us)} tiles"


def _summary(ended: Sequence[_Search]) -> str:
    outcomes = [outcome for search in ended for outcome in search.outcomes.values()]
    skipped = sum(isinstance(outcome, str) for outcome in outcomes)
    return f"{len(ended)} searches, {len(outcomes)} tiles tried, {skipped} skipped"
