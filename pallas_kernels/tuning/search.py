"""The search for the fastest of many tiles: by steps of one number, downhill.

A tile is a frozen dataclass of whole numbers and of such dataclasses. A ladder lists the values of
one number in order; its name is the path to it, as in "shrink.block_k".
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pallas_kernels.tuning.table import Segments

MAX_ROUNDS = 5
# A gain below this is noise: it would only lengthen the search.
LEAST_GAIN = 0.02

type Ladders = Mapping[str, Sequence[int]]
# Microseconds of a call by class of segments, or why there are none.
type Outcome = Mapping[Segments, float] | str


def paths(tile: Any) -> Iterator[tuple[str, int]]:
    """The numbers of a tile and the paths to them."""
    for field in dataclasses.fields(tile):
        value = getattr(tile, field.name)
        if dataclasses.is_dataclass(value):
            yield from ((f"{field.name}.{path}", number) for path, number in paths(value))
        else:
            yield field.name, value


def replaced[Tile](tile: Tile, path: str, number: int) -> Tile:
    """The tile with another number at a path."""
    name, _, rest = path.partition(".")
    value = replaced(getattr(tile, name), rest, number) if rest else number
    return dataclasses.replace(tile, **{name: value})  # pyright: ignore[reportArgumentType]


def neighbours[Tile](
    tile: Tile, ladders: Ladders, legal: Callable[[Tile], bool]
) -> dict[str, list[Tile]]:
    """The legal tiles one rung up or down from a tile, by the path that differs.

    A number that is on no rung has those next to it for neighbours.
    """
    found = {}
    for path, number in paths(tile):
        below = [rung for rung in ladders.get(path, ()) if rung < number]
        above = [rung for rung in ladders.get(path, ()) if rung > number]
        near = (replaced(tile, path, rung) for rung in (*below[-1:], *above[:1]))
        found[path] = [other for other in near if legal(other)]
    return found


def mean_us(outcome: Outcome) -> float:
    """Geometric mean of the classes' times: what the search lowers. Infinite for a failure."""
    if isinstance(outcome, str):
        return math.inf
    return math.exp(sum(map(math.log, outcome.values())) / len(outcome))


def descend[Tile](
    start: Tile,
    *,
    ladders: Ladders,
    legal: Callable[[Tile], bool],
    measure: Callable[[Sequence[Tile]], Mapping[Tile, Outcome]],
) -> dict[Tile, Outcome]:
    """Measures tiles round by round, each around the best so far, until none gains any more.

    Two launches add up to a call, and most numbers change one of them alone. So a round takes the
    best steps of all paths together, too.

    Args:
      start: a legal tile.
      ladders: rungs of each path in ascending order; a path without any keeps its number.
      legal: whether a tile is worth being compiled.
      measure: compiles and times tiles; may leave some out when time is up.

    Returns:
      What each measured tile took.
    """
    outcomes = dict(measure([start]))
    best = start
    for _ in range(MAX_ROUNDS):
        near = neighbours(best, ladders, legal)
        new = [tile for tiles in near.values() for tile in tiles if tile not in outcomes]
        outcomes |= measure(new)
        us = functools.partial(_us, outcomes)
        steps = {path: min(tiles, key=us, default=best) for path, tiles in near.items()}
        together = best
        for path, step in steps.items():
            if us(step) < us(best):
                together = replaced(together, path, dict(paths(step))[path])
        if together not in outcomes and legal(together):
            outcomes |= measure([together])
        first = min(outcomes, key=us)
        if not us(first) < (1 - LEAST_GAIN) * us(best):
            break
        best = first
    return outcomes


def _us(outcomes: Mapping, tile: Any) -> float:
    return mean_us(outcomes.get(tile, "not measured"))
