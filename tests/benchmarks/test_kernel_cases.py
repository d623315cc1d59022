"""What `benchmarks.kernels` runs: its points, and that every rival computes the same on a CPU."""

import functools

import jax
import numpy as np
import pytest

from benchmarks import attention_cases, kernels, lora_cases, lora_inputs, lora_summary, merge_cases
from benchmarks.attention_cases import Attention
from benchmarks.gpu import Options
from benchmarks.kernels import GOALS, MIXED, lora_groups, sweep
from benchmarks.lora_inputs import Point
from pallas_kernels.tuning import shapes
from pallas_kernels.tuning.shapes import LinearShape, ModelShape

TINY = ModelShape(layers=4, width=64, heads=4, kv_heads=2, head_width=16, mlp_width=96)


@pytest.fixture(autouse=True)
def xla_alone(monkeypatch):
    """Has "xla" stand in for the kernels, which need a GPU."""

    def by_xla(call, *args, implementation, tile=None, **keywords):
        return call(*args, implementation="xla", **keywords)

    for module, name in (
        (lora_cases, "lora_linear"),
        (lora_cases, "lora_matmul"),
        (attention_cases, "attend"),
        (merge_cases, "lora_merge"),
    ):
        monkeypatch.setattr(module, name, functools.partial(by_xla, getattr(module, name)))
    monkeypatch.setitem(shapes.MODELS, "tiny", TINY)


def errors(programs):
    """Name -> error of each program, run as it is."""
    return {p.name: p.error(p.run(p.carry(), *p.inputs())) for p in programs}


def test_the_sweep_holds_no_goal_twice_and_no_batch_with_more_adapters_than_tokens():
    points = [*GOALS, *sweep(quick=False)]
    assert set(sweep(quick=True)) == set(MIXED) < set(points)
    assert len(points) == len(set(points))
    assert all(len(point.ranks) <= point.tokens for point in points)


def test_adapters_fit_the_pool():
    assert all(sum(point.pages) <= lora_inputs.PAGES for point in [*GOALS, *sweep(quick=False)])


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
    impls = ["product", "triton", "two-launches", "fixed-tile", *lora_cases.RIVALS]
    assert [p.fields["impl"] for p in programs] == impls
    assert {p.baseline for p in programs[1:]} == {programs[0].name}
    found = errors(programs)
    assert all(error <= 1 for error in found.values()), found


def test_linears_that_share_an_input_are_one_call():
    point = Point(tokens=8, ranks=(16, 32))
    ((*programs,),) = lora_groups(LinearShape(64, (32, 16)), [point], name="lora/x", model="tiny")
    found = errors(programs)
    assert len(found) == 4
    assert all(error <= 1 for error in found.values()), found


def test_a_call_has_its_input_once_the_call_before_has_ended():
    points = [Point(tokens=8, ranks=(8,))]
    ((*programs,),) = lora_groups(LinearShape(64, (48,)), points, name="lora/x", model="tiny")
    for program in programs:
        _, xs_TD = program.carry()
        (ys_TE, after_TD), _ = program.run(program.carry(), *program.inputs())
        np.testing.assert_array_equal(bits(after_TD), bits(xs_TD))
        xs_TD[3] = xs_TD[3].at[0].set(np.nan)  # of the fourth layer's call, in both rounds
        (lost_TE, _), _ = program.run((ys_TE, xs_TD), *program.inputs())
        assert [bool(np.isnan(y_TE[0, 0])) for y_TE in lost_TE] == [n >= 3 for n in range(32)]


def bits(xs) -> np.ndarray:
    return np.stack(xs).view(np.uint16)


def test_the_check_sees_a_wrong_page():
    point = Point(tokens=8, ranks=(64,) * 8)
    ((_, program, *_),) = lora_groups(LinearShape(64, (48,)), [point], name="lora/x", model="tiny")
    w_DE, (pools, tiles) = program.inputs()
    shifted = tiles.__class__(**fields(tiles) | {"plus_M": tiles.plus_M + 1})
    assert program.error(program.run(program.carry(), w_DE, (pools, shifted))) > 10


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


def test_a_whole_run_names_every_program_once_and_takes_no_memory_before_it_starts():
    before = len(jax.live_arrays())
    options = Options.parse("A bench.", [])
    names = [program.name for group in kernels.groups(options) for program in group]
    assert len(jax.live_arrays()) == before
    once = [name for name in names if not name.endswith("/product")]  # every group has its own
    assert len(once) == len(set(once))
    assert {name.rsplit("/", 1)[1] for name in names if "t4096/a8/r64/" in name} == {
        "triton",
        "fixed-tile",
        "masked-dense",
        "loop",
    }
    assert not any("/a32/" in name and name.endswith("/loop") for name in names)


def added(impl, us, *, tokens=32, adapters=32, rank=64, host=0.5):
    name = f"lora/x/t{tokens}/a{adapters}/r{rank}/{impl}"
    fields = dict(batch=tokens, adapters=adapters, rank_sum=adapters * rank, host_fraction=host)
    return fields | dict(name=name, impl=impl, added_ms=us / 1e3)


def test_the_summary_has_means_the_worst_point_and_the_time_a_rank():
    records = [added("triton", 4.0), added("masked-dense", 8.0), added("loop", 16.0)]
    records.append(added("two-launches", 1.0))  # ours, too
    records += [added("triton", 2.0, rank=8), added("masked-dense", 2.0, rank=8, host=0.9)]
    first, *rest = lora_summary.lines([*records, {"name": "x", "impl": "product"}])
    assert (
        "2 points: 0.71 in geometric mean, 0 above 1.1, the worst 1.00 (lora/x/t32/a32/r8)" in first
    )
    assert "1 points: 0.50 in geometric mean" in rest[0]  # at rank 8 the rival waits for the host
    assert rest[1:3] == ["masked-dense to ours: 1.41", "loop to ours: 4.00"]
    assert "sum to 256: adds 2.0 us, 7.81 ns a rank" in rest[3]
    assert lora_summary.lines([{"name": "x", "impl": "product"}]) == []
