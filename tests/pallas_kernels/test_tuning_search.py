"""The descent over tiles: what it measures, and that it finds what is to be found."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.tuning.search import (
    MAX_ROUNDS,
    descend,
    mean_us,
    neighbours,
    paths,
    replaced,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    block: int
    stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    rows: int
    cut: Cut


RUNGS = (1, 2, 4, 8, 16)
LADDERS = {"rows": RUNGS, "cut.block": RUNGS, "cut.stages": RUNGS}
TILES = st.builds(
    lambda rows, block, stages: Tile(rows=rows, cut=Cut(block=block, stages=stages)),
    *[st.sampled_from(RUNGS)] * 3,
)


def anything(tile) -> bool:
    return True


def search(*starts: Tile, legal, measure) -> dict:
    """Sends a descent what a function says of its tiles."""
    rounds, outcomes = descend(starts, ladders=LADDERS, legal=legal), None
    while True:
        try:
            outcomes = measure(rounds.send(outcomes))
        except StopIteration as end:
            return end.value


def distance(a: Tile, b: Tile) -> float:
    """In rungs, of all numbers."""
    return sum(abs(math.log2(m / n)) for (_, m), (_, n) in zip(paths(a), paths(b), strict=True))


def test_paths_name_every_number():
    tile = Tile(rows=1, cut=Cut(block=2, stages=3))
    assert dict(paths(tile)) == {"rows": 1, "cut.block": 2, "cut.stages": 3}
    assert replaced(tile, "cut.block", 9) == Tile(rows=1, cut=Cut(block=9, stages=3))


@given(tile=TILES, limit=st.integers(1, 4096))
def test_neighbours_differ_in_one_rung_and_are_legal(tile, limit):
    def legal(other):
        return other.rows * other.cut.block * other.cut.stages <= limit

    for path, found in neighbours(tile, LADDERS, legal).items():
        for other in found:
            changed = [p for p, n in paths(other) if dict(paths(tile))[p] != n]
            assert changed == [path]
            assert distance(tile, other) == 1
            assert legal(other)


def test_a_number_between_rungs_has_both_and_one_without_a_ladder_stays():
    tile = Tile(rows=3, cut=Cut(block=1, stages=1))
    found = neighbours(tile, {"rows": RUNGS}, anything)
    assert [other.rows for other in found["rows"]] == [2, 4]
    assert found["cut.block"] == []


@given(start=TILES, goal=TILES, limit=st.sampled_from([16, 4096]))
def test_the_descent_measures_only_legal_tiles_each_once_and_never_loses(start, goal, limit):
    measured = []

    def legal(tile):
        return tile.rows * tile.cut.block <= limit

    def measure(tiles):
        measured.extend(tiles)
        return {tile: {"few": 10 + distance(tile, goal)} for tile in tiles}

    outcomes = search(start, legal=legal, measure=measure)
    assert len(measured) == len(set(measured)) == len(outcomes)
    assert all(map(legal, measured[1:]))
    assert min(map(mean_us, outcomes.values())) <= mean_us(outcomes[start])
    if limit == 4096:  # a round takes a step of every number, and no number is farther than four
        assert goal in outcomes
        assert len(outcomes) <= 1 + MAX_ROUNDS * (2 * len(LADDERS) + 1)


def test_a_number_whose_steps_lost_clearly_is_not_tried_again():
    goal, rounds = Tile(rows=16, cut=Cut(block=1, stages=4)), []

    def measure(tiles):
        rounds.append(tiles)
        return {tile: {"few": 1 + distance(tile, goal)} for tile in tiles}

    search(Tile(rows=1, cut=Cut(block=1, stages=4)), legal=anything, measure=measure)
    assert {tile.cut.stages for tile in rounds[0]} == {2, 4, 8}
    assert {tile.cut.stages for tile in itertools.chain(*rounds[1:])} == {4}


def test_when_all_steps_together_lose_the_best_alone_is_gone_on_from():
    start = Tile(rows=1, cut=Cut(block=1, stages=1))

    def measure(tiles):
        us = {tile: 10.0 - tile.rows - tile.cut.block / 2 for tile in tiles}
        return {t: {"few": 20.0 if t.rows * t.cut.block > 3 else us[t]} for t in tiles}

    outcomes = search(start, legal=lambda tile: tile.rows < 4, measure=measure)
    assert Tile(rows=2, cut=Cut(block=2, stages=1)) in outcomes
    assert min(map(mean_us, outcomes.values())) == mean_us(
        outcomes[Tile(rows=2, cut=Cut(block=1, stages=1))]
    )


def test_failures_are_left_behind():
    start = Tile(rows=1, cut=Cut(block=1, stages=1))

    def measure(tiles):
        return {t: "spills" if t.rows > 1 else {"few": 8 / t.cut.block} for t in tiles}

    outcomes = search(start, legal=anything, measure=measure)
    best = min(outcomes, key=lambda tile: mean_us(outcomes[tile]))
    assert (best.rows, best.cut.block) == (1, 16)
    assert "spills" in outcomes.values()


def test_a_search_may_begin_with_a_failure():
    start = Tile(rows=1, cut=Cut(block=1, stages=1))

    def measure(tiles):
        return {tile: "spills" if tile == start else {"few": 1.0} for tile in tiles}

    outcomes = search(start, legal=anything, measure=measure)
    assert min(map(mean_us, outcomes.values())) == 1


def test_of_several_starts_the_best_is_gone_on_from():
    low, high, bad = (Tile(rows=rows, cut=Cut(block=1, stages=1)) for rows in (1, 16, 8))
    rounds = []

    def measure(tiles):  # between the starts it is slower than around either
        rounds.append(tiles)
        us = {1: 10.0, 2: 20.0, 4: 20.0, 8: "spills", 16: 9.0}
        times = {tile: us[tile.rows] for tile in tiles}
        return {
            t: at if isinstance(at, str) else {"few": at / t.cut.block} for t, at in times.items()
        }

    outcomes = search(low, bad, high, legal=anything, measure=measure)
    assert rounds[0] == [low, bad, high]
    assert min(outcomes, key=lambda t: mean_us(outcomes[t])) == replaced(high, "cut.block", 16)
    assert 2 not in {tile.rows for tile in outcomes}


def test_the_mean_weighs_ratios_and_a_failure_is_worse_than_any_time():
    assert mean_us({"few": 2.0, "many": 8.0}) == pytest.approx(4.0)
    assert mean_us("wrong") == math.inf
