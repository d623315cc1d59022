"""The search for the tiles of one shape: from the best guess downhill, into the device's table."""

from collections.abc import Callable, Mapping, Sequence

from pallas_kernels.lora_matmul.candidates import Task, ladders, legal
from pallas_kernels.lora_matmul.tiles import LoraTile
from pallas_kernels.lora_matmul.tuned import OP, at_rows, computed_tile
from pallas_kernels.tuning.search import Outcome, descend, mean_us
from pallas_kernels.tuning.table import Entry, Key, Segments, Skipped, Table

type Measure = Callable[[Task, Sequence[LoraTile]], Mapping[LoraTile, Outcome]]


def key_of(task: Task, segments: Segments = "any") -> Key:
    return Key(
        op=OP,
        width=task.linear.width,
        columns=task.columns,
        tokens=task.tokens,
        segments=segments,
    )


def is_done(task: Task, table: Table) -> bool:
    """Whether the table has what `search` would put there."""
    return (key_of(task), task.block_rows) in table.entries


def search(task: Task, table: Table, measure: Measure) -> Mapping[LoraTile, Outcome]:
    """Measures tiles; puts the best of each class of segments, and what failed, into the table.

    "any" is the tile of the least geometric mean of the classes' times: no class pays much for
    another. Classes that so few rows cannot have are left out.

    Returns:
      What each tile took; nothing if all starting points have failed before.
    """
    failed = {s.tile for s in table.skipped if s.key == key_of(task)}
    entry = table.nearest(key_of(task), height=task.block_rows)
    guesses = [computed_tile(key_of(task), block_rows=task.block_rows, device=table.device)]
    if entry is not None:
        guesses.insert(0, at_rows(entry, task.tokens))
    start = next((tile for tile in guesses if tile not in failed), None)
    if start is None:
        return {}
    outcomes = descend(
        start,
        ladders=ladders(task),
        legal=lambda tile: legal(tile, task) and tile not in failed,
        measure=lambda tiles: measure(task, tiles),
    )
    for tile, outcome in outcomes.items():
        if isinstance(outcome, str):
            table.skipped.append(Skipped(key=key_of(task), tile=tile, reason=outcome))
    timed = {tile: us for tile, us in outcomes.items() if not isinstance(us, str)}
    if timed:
        _add_best(task, table, timed)
    return outcomes


def _add_best(task: Task, table: Table, timed: Mapping[LoraTile, Mapping[Segments, float]]) -> None:
    us_of: dict[Segments, dict[LoraTile, float]] = {
        segments: {tile: us[segments] for tile, us in timed.items()}
        for segments in next(iter(timed.values()))
    }
    us_of["any"] = {tile: round(mean_us(us), 2) for tile, us in timed.items()}
    for segments, us in us_of.items():
        best = min(us, key=us.__getitem__)
        table.add(Entry(key=key_of(task, segments), tile=best, us=us[best]))
