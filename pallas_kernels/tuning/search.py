"""The search for the fastest of many tiles: by steps of one number, downhill.

A tile is a frozen dataclass of whole numbers and of such dataclasses. A ladder lists the values of
one number in order; its name is the path to it, as in "shrink.block_k".
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from pallas_kernels.tuning.table import Segments

MAX_ROUNDS = 5
# A gain below this is noise: it would only lengthen the search.
LEAST_GAIN = 0.02
# A step that takes so many times as long is not worth a second look when other numbers change.
CLEAR_LOSS = 1.05

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
    starts: Sequence[Tile], *, ladders: Ladders, legal: Callable[[Tile], bool]
) -> Generator[list[Tile], Mapping[Tile, Outcome], dict[Tile, Outcome]]:
    """Goes downhill from the best start, round by round, each around the best so far, until none
    gains any more.

    Most numbers change what others take but little. So a round goes on from the best steps of all
    numbers together, and leaves numbers alone whose steps lost clearly.

    Args:
      starts: legal tiles, each once; at least one.
      ladders: rungs of each path in ascending order; a path without any keeps its number.
      legal: whether a tile is worth being compiled.

    Yields:
      The tiles of a round, to be measured; it is sent what they took, and may miss some.

    Returns:
      What each measured tile took.
    """
    outcomes: dict[Tile, Outcome] = {}
    if len(starts) > 1:
        outcomes |= yield list(starts)
    centre, least_us = min(starts, key=functools.partial(_us, outcomes)), math.inf
    settled: set[str] = set()
    for _ in range(MAX_ROUNDS):
        near = neighbours(centre, ladders, legal)
        near = {path: tiles for path, tiles in near.items() if tiles and path not in settled}
        around = itertools.chain([centre], *near.values())
        new = [tile for tile in dict.fromkeys(around) if tile not in outcomes]
        outcomes |= (yield new) if new else {}
        us = functools.partial(_us, outcomes)
        best = min([centre, *outcomes], key=us)
        if us(best) < (1 - LEAST_GAIN) * least_us:
            least_us = us(best)
            steps = {path: min(tiles, key=us) for path, tiles in near.items()}
            settled |= {path for path, step in steps.items() if us(step) > CLEAR_LOSS * us(centre)}
            together = _together(centre, steps, us)
            centre = together if legal(together) and together not in outcomes else best
        elif centre == best:
            break
        else:  # all steps together were one too many
            centre = best
    return outcomes


def _together[Tile](centre: Tile, steps: Mapping[str, Tile], us: Callable[[Tile], float]) -> Tile:
    """The centre with every step that gains."""
    together = centre
    for path, step in steps.items():
        if us(step) < us(centre):
            together = replaced(together, path, dict(paths(step))[path])
    return together


def _us(outcomes: Mapping, tile: Any) -> float:
    return mean_us(outcomes.get(tile, "not measured"))
