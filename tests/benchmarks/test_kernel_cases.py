"""What `benchmarks.kernels` runs: its points, and that every rival computes the same on a CPU."""

import functools

import pytest

from benchmarks import attention_cases, kernels, lora_cases, merge_cases
from benchmarks.attention_cases import Attention
from benchmarks.kernels import GOALS, MIXED, lora_groups, sweep
from benchmarks.lora_cases import Point
from pallas_kernels.tuning import shapes
from pallas_kernels.tuning.shapes import LinearShape, ModelShape

TINY = ModelShape(layers=4, width=64, heads=4, kv_heads=2, head_width=16, mlp_width=96)


@pytest.fixture(autouse=True)
def xla_alone(monkeypatch):
    """Has "xla" stand in for the kernels, which need a GPU."""

    def by_xla(call, *args, implementation, tile=None, **keywords):
        return call(*args, implementation="xla", **keywords)

    for module, name in (
        (lora_cases, "lora_matmul"),
        (attention_cases, "attend"),
        (merge_cases, "lora_merge"),
    ):
        monkeypatch.setattr(module, name, functools.partial(by_xla, getattr(module, name)))
    monkeypatch.setitem(shapes.MODELS, "tiny", TINY)


def errors(programs):
    """Name -> error of each program, run as it is."""
    return {p.name: p.error(p.run(p.carry(), *p.variants[0])) for p in programs}


def test_the_sweep_holds_the_goals_and_no_batch_with_more_adapters_than_tokens():
    points = sweep(quick=False)
    assert set(sweep(quick=True)) == {*GOALS, *MIXED} < set(points)
    assert len(points) == len(set(points))
    assert all(len(point.ranks) <= point.tokens for point in points)


def test_every_group_of_adapters_fits_the_pool():
    for point in sweep(quick=False):
        assert point.groups >= 1
        assert point.groups * sum(point.pages) <= lora_cases.PAGES


@pytest.mark.parametrize(
    "point",
    [
        Point(tokens=8, ranks=(64,) * 8),
        Point(tokens=8, ranks=(8,)),
        Point(tokens=32, ranks=(8, 16, 24, 64) * 2),
    ],
    ids=lambda point: point.name,
)
def test_all_ways_to_multiply_adapters_agree(point):
    ((*programs,),) = lora_groups(LinearShape(64, (48,)), [point], name="lora/x", model="tiny")
    assert [p.fields["impl"] for p in programs] == ["triton", "fixed-tile", *lora_cases.RIVALS]
    found = errors(programs)
    assert all(error <= 1 for error in found.values()), found


def test_linears_that_share_an_input_are_one_call():
    point = Point(tokens=8, ranks=(16, 32))
    ((*programs,),) = lora_groups(LinearShape(64, (32, 16)), [point], name="lora/x", model="tiny")
    found = errors(programs)
    assert len(found) == 2
    assert all(error <= 1 for error in found.values()), found


def test_the_check_sees_a_wrong_page():
    point = Point(tokens=8, ranks=(64,) * 8)
    ((program, *_),) = lora_groups(LinearShape(64, (48,)), [point], name="lora/x", model="tiny")
    x_TD, (pool,), tiles = program.variants[0]
    shifted = [tile.__class__(**fields(tile) | {"plus_M": tile.plus_M + 1}) for tile in tiles]
    assert program.error(program.run(program.carry(), x_TD, [pool], shifted)) > 10


def fields(tile):
    return {name: getattr(tile, name) for name in tile.__dataclass_fields__}


@pytest.mark.parametrize(("tokens", "kv_tokens"), [(1, 100), (40, 100), (64, 64)])
def test_attention_is_right_and_does_not_see_past_the_end(tokens, kv_tokens):
    case = Attention(model="tiny", requests=2, tokens=tokens, kv_tokens=kv_tokens)
    found = errors(attention_cases.programs(case))
    assert all(error <= 1 for error in found.values()), found


def test_merged_copies_are_right_in_every_linear(monkeypatch):
    monkeypatch.setattr(merge_cases, "CHECKED_ROWS", 32)
    *merges, copy = merge_cases.programs("tiny")
    assert copy.name == "merge/tiny/copy"
    found = errors(merges)
    assert list(found) == ["merge/tiny/mosaic", "merge/tiny/triton", "merge/tiny/xla"]
    assert all(error <= 1 for error in found.values()), found


def test_names_are_unique_over_a_whole_run():
    names = [case.name for case in kernels.ATTENTION]
    names += [point.name for point in sweep(quick=False)]
    assert len(names) == len(set(names))
