import json

import pytest

from valora_jax.replay.arrivals import without_adapters
from valora_jax.replay.points import adapters_of, kind_trace, points
from valora_jax.replay.settings import ReplaySettings

ROWS = [{"t": t, "adapter": a, "text": 10, "out": 5} for t, a in [(1.0, 3), (0.5, None), (2.0, 0)]]


def points_of(**flags):
    settings = ReplaySettings(simulate=True, **flags)
    return list(points(settings, image_tokens=576, capacity=10.0))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "traces.json"
    path.write_text(json.dumps({"slow": ROWS, "none": [], "fast": ROWS[:1]}))
    return path


def test_a_sweep_has_every_combination():
    swept = points_of(adapters=(2, 4), skews=(0.0, 0.9), zipf=(1.0,), at_once=True, seconds=5.0)
    paces = ["load 0.3", "load 0.6", "load 0.8", "at once"]
    assert [(p.adapters, p.spread, p.pace) for p in swept] == [
        (adapters, spread, pace)
        for adapters in (2, 4)
        for spread in ("skew 0", "skew 0.9", "zipf 1")
        for pace in paces
    ]


def test_loads_are_shares_of_the_capacity():
    [point] = points_of(loads=(0.5,), seconds=20.0)
    assert (point.rate, len(point.trace)) == (5.0, 100)
    assert point.trace[-1].at_s == pytest.approx(20, rel=0.3)


def test_rates_are_in_requests_a_second():
    [point] = points_of(rates=(2.0,), seconds=3.0)
    assert (point.pace, point.load, len(point.trace)) == ("rate 2", None, 6)


def test_at_once_offers_as_many_as_the_capacity_serves():
    point = points_of(rates=(2.0,), seconds=3.0, at_once=True)[-1]
    assert (point.rate, len(point.trace)) == (None, 30)
    assert {arrival.at_s for arrival in point.trace} == {0.0}


def test_bounds_of_all_spreads_are_the_same():
    swept = points_of(adapters=(2, 8), skews=(0.1, 0.9), loads=(0.5,))
    bounds = {tuple(without_adapters(point.trace)) for point in swept}
    assert (len(swept), len(bounds)) == (4, 1)


def test_a_file_has_its_own_traces(file):
    slow, at_once, fast, _ = points_of(trace=file, at_once=True)
    assert [a.adapter for a in slow.trace] == [None, 3, 0]
    assert (slow.kind, slow.spread, slow.adapters, slow.rate) == ("traces", "slow", 4, 1.5)
    assert (at_once.pace, at_once.spread, fast.spread) == ("at once", "slow", "fast")
    assert [p.spread for p in points_of(trace=file, names=("fast",))] == ["fast"]


def test_a_trace_that_a_file_lacks_is_named(file):
    with pytest.raises(ValueError, match="has no trace 'none'; known: slow, fast"):
        points_of(trace=file, names=("none",))


def test_a_file_without_requests_is_refused(tmp_path):
    path = tmp_path / "traces.json"
    path.write_text('{"none": []}')
    with pytest.raises(ValueError, match="holds no request"):
        points_of(trace=path)


def test_adapters_are_as_many_as_any_trace_names(file):
    assert adapters_of(ReplaySettings(simulate=True, adapters=(4, 32, 8))) == 32
    assert adapters_of(ReplaySettings(simulate=True, trace=file)) == 4
    assert adapters_of(ReplaySettings(simulate=True, trace=file, names=("slow",))) == 4


def test_the_kind_of_requests_is_that_of_the_sweep(file):
    video = kind_trace(ReplaySettings(simulate=True, kind="video"), image_tokens=576, requests=20)
    assert {arrival.images for arrival in video} == {6}
    own = kind_trace(ReplaySettings(simulate=True, trace=file), image_tokens=4, requests=2)
    assert [arrival.prompt_tokens for arrival in own] == [14, 14]
