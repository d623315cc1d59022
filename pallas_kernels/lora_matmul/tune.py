"""The search for the tiles of one shape: from guesses downhill, into the device's table."""

import collections
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from pallas_kernels.lora_matmul import candidates, candidates_linear
from pallas_kernels.lora_matmul.candidates import RARE_STEPS, STEPS, Task
from pallas_kernels.lora_matmul.tiles import LoraTile
from pallas_kernels.lora_matmul.tiles_linear import MAX_ROWS, LinearTile, linear_tile
from pallas_kernels.lora_matmul.tuned import ITEM_BYTES, LINEAR, LORA, at_rows, computed_tile
from pallas_kernels.tuning.search import Ladders, Outcome, descend, mean_us
from pallas_kernels.tuning.table import Entry, Key, Segments, Skipped, Table

# Heights of row tiles are compared for so many shapes, a model's; others get the winner alone.
COMPARED_SHAPES = 4
# How many adapters a step brings: not known, or one, as for images.
ASKED_SEGMENTS: tuple[Segments, ...] = ("any", "few")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Space[Tile]:
    """The tiles of an operator: where a search on a device begins, and where it may go."""

    starts: Callable[[Task, str], list[Tile]]
    ladders: Callable[[Task], Ladders]
    legal: Callable[[Tile, Task], bool]


def _computed(task: Task, device: str) -> list[LoraTile]:
    return [computed_tile(key_of(task), block_rows=task.block_rows, device=device)]


def _computed_linear(task: Task, device: str) -> list[LinearTile]:
    """As for those rows, for the fewest, and for the most, which may have another range.

    No search adds a range: it pays where blocks are smaller, too, and the first step would lose.
    """
    return [
        linear_tile(
            rows=rows,
            width=task.linear.width,
            columns=task.columns,
            parts=len(task.linear.columns),
            itemsize=ITEM_BYTES,
            tile_rows=task.block_rows,
            device=device,
        )
        for rows in (task.tokens, 1, MAX_ROWS)
    ]


SPACES: Mapping[str, Space[Any]] = {
    LORA: Space(starts=_computed, ladders=candidates.ladders, legal=candidates.legal),
    LINEAR: Space(
        starts=_computed_linear,
        ladders=candidates_linear.ladders,
        legal=candidates_linear.legal,
    ),
}


def key_of(task: Task, segments: Segments = "any") -> Key:
    return Key(
        op=task.op,
        width=task.linear.width,
        columns=task.columns,
        tokens=task.tokens,
        segments=segments,
    )


def is_done(task: Task, table: Table) -> bool:
    """Whether the table has what `search` would put there, or nobody would ask for it."""
    return (key_of(task), task.block_rows) in table.entries or _height_lost(task, table)


def _height_lost(task: Task, table: Table) -> bool:
    """Whether so many rows have better row tiles, whatever linear they are multiplied by."""
    heights_of = {(op, rows): heights for op, rows, heights in STEPS + RARE_STEPS}
    heights = heights_of[task.op, task.tokens]
    measured = collections.Counter(
        (key.width, key.columns)
        for key, _ in table.entries
        if (key.op, key.tokens, key.segments) == (task.op, task.tokens, "any")
    )
    if list(measured.values()).count(len(heights)) < COMPARED_SHAPES:
        return False
    best = {
        table.height(task.op, tokens=task.tokens, segments=segments) for segments in ASKED_SEGMENTS
    }
    return task.block_rows not in best


def search(
    task: Task, table: Table
) -> Generator[Sequence[Any], Mapping[Any, Outcome], Mapping[Any, Outcome]]:
    """Puts the best tile of each class of segments, and what failed, into the table.

    "any" is the tile of the least geometric mean of the classes' times: no class pays much for
    another. Classes that so few rows cannot have are left out.

    Yields:
      Tiles to be measured; it is sent what they took.

    Returns:
      What each tile took; nothing if all starting points have failed before.
    """
    space, key = SPACES[task.op], key_of(task)
    failed = {s.tile for s in table.skipped if s.key == key}

    def legal(tile) -> bool:
        return space.legal(tile, task) and tile not in failed

    guesses = space.starts(task, table.device)
    if (entry := table.nearest(key, height=task.block_rows)) is not None:
        guesses.insert(0, at_rows(entry, task.tokens))
    starts = list(filter(legal, dict.fromkeys(guesses)))
    if not starts:
        return {}
    outcomes = yield from descend(starts, ladders=space.ladders(task), legal=legal)
    for tile, outcome in outcomes.items():
        if isinstance(outcome, str):
            table.skipped.append(Skipped(key=key, tile=tile, reason=outcome))
    timed = {tile: us for tile, us in outcomes.items() if not isinstance(us, str)}
    if timed:
        _add_best(task, table, timed)
    return outcomes


def _add_best(task: Task, table: Table, timed: Mapping[Any, Mapping[Segments, float]]) -> None:
    us_of: dict[Segments, dict[Any, float]] = {
        segments: {tile: us[segments] for tile, us in timed.items()}
        for segments in next(iter(timed.values()))
    }
    us_of["any"] = {tile: round(mean_us(us), 2) for tile, us in timed.items()}
    for segments, us in us_of.items():
        best = min(us, key=us.__getitem__)
        table.add(Entry(key=key_of(task, segments), tile=best, us=us[best]))
