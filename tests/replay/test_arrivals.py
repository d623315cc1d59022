import collections
import itertools
import json
import math
import statistics

import pytest

from valora_jax.replay.arrivals import (
    VIDEO_ANALYTICS,
    Arrival,
    Lengths,
    at_once,
    make_trace,
    read_traces,
    skewed,
    without_adapters,
    zipf,
)

ONE_TOKEN = Lengths(images=0, text=(1, 1), output=(1, 1))


def gaps_of(trace: list[Arrival]) -> list[float]:
    return [b.at_s - a.at_s for a, b in itertools.pairwise(trace)]


def test_skew_is_the_share_of_the_first_and_no_less_than_an_equal_one():
    assert skewed(5, 0.8) == pytest.approx([0.8, 0.05, 0.05, 0.05, 0.05])
    assert skewed(4, 0.0) == [0.25] * 4
    assert skewed(1, 0.5) == [1.0]


def test_zipf_weights_fall_with_the_rank():
    assert zipf(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert zipf(4, 0.0) == [0.25] * 4


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gaps_have_the_rate_and_the_spread_asked_for(cv):
    gaps = gaps_of(make_trace([1.0], rate=20.0, requests=20_000, cv=cv))
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(1 / 20, rel=0.05)
    assert statistics.pstdev(gaps) / mean == pytest.approx(cv, rel=0.05)


def test_adapters_and_lengths_are_drawn_as_asked():
    trace = make_trace(skewed(4, 0.7), rate=1.0, requests=5000, lengths=VIDEO_ANALYTICS)
    shares = collections.Counter(arrival.adapter for arrival in trace)
    assert shares[0] / 5000 == pytest.approx(0.7, abs=0.03)
    assert {arrival.output_tokens for arrival in trace} == set(range(5, 11))
    assert all(3476 <= arrival.prompt_tokens <= 3536 for arrival in trace)
    assert {arrival.images for arrival in trace} == {6}


def test_an_image_takes_what_the_model_says():
    small = make_trace([1.0], rate=1.0, requests=9, lengths=VIDEO_ANALYTICS, image_tokens=4)
    assert all(6 * 4 + 20 <= arrival.prompt_tokens <= 6 * 4 + 80 for arrival in small)


def test_a_seed_gives_the_same_requests_at_any_rate():
    slow, fast = (make_trace(zipf(8, 1.0), rate=rate, requests=50, seed=3) for rate in (1.0, 10.0))
    assert [a.adapter for a in slow] == [a.adapter for a in fast]
    assert [a.at_s for a in slow] == pytest.approx([10 * a.at_s for a in fast])
    assert slow != make_trace(zipf(8, 1.0), rate=1.0, requests=50, seed=4)


def test_every_wrong_number_is_named():
    with pytest.raises(ValueError, match=r"(?s)rate=0 must be positive.*cv=nan must be positive"):
        make_trace([1.0], rate=0, requests=1, cv=math.nan, lengths=ONE_TOKEN)


def test_traces_are_read_from_json(tmp_path):
    path = tmp_path / "traces.json"
    path.write_text(json.dumps({"slow": [{"t": 0.5, "adapter": 3, "text": 40, "out": 16}]}))
    [arrival] = read_traces(path, image_tokens=576)["slow"]
    assert arrival == Arrival(at_s=0.5, adapter=3, prompt_tokens=616, output_tokens=16, images=1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"slow": [1]}',
        '{"slow": [{"t": 0}]}',
        '{"slow": [{"t": 0, "adapter": 1, "text": 5}]}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_a_file_of_something_else_is_one_message(tmp_path, text):
    path = tmp_path / "traces.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"traces\.json holds no traces: .*; want JSON"):
        read_traces(path)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("t", "x", "seconds from the start"),
        ("t", True, "seconds from the start"),
        ("t", -0.5, "seconds from the start"),
        ("t", math.nan, "seconds from the start"),
        ("t", math.inf, "seconds from the start"),
        pytest.param("t", 10**400, "seconds from the start", id="a time without end"),
        ("adapter", -1, r"null or a whole number in \[0, 1024\)"),
        ("adapter", 2.7, "null or a whole number"),
        ("adapter", True, "null or a whole number"),
        ("adapter", 1024, "null or a whole number"),
        ("text", 5.9, "a whole number of tokens"),
        ("text", -5, "a whole number of tokens"),
        ("out", 0, "a whole number of tokens"),
        ("out", None, "a whole number of tokens"),
    ],
)
def test_what_a_request_cannot_be_is_named_with_its_place(tmp_path, field, value, wanted):
    path = tmp_path / "traces.json"
    row = {"t": 0, "adapter": 1, "text": 5, "out": 1}
    path.write_text(json.dumps({"slow": [row, row | {field: value}]}))
    with pytest.raises(ValueError, match=rf"slow\[1\] has {field}=.*, want {wanted}"):
        read_traces(path)


def test_a_file_of_many_requests_may_have_as_many_adapters(tmp_path):
    path = tmp_path / "traces.json"
    rows = [{"t": 0, "adapter": i, "text": 5, "out": 1} for i in range(1100)]
    path.write_text(json.dumps({"a": rows[:1000], "b": rows[1000:]}))
    assert read_traces(path)["b"][-1].adapter == 1099


def test_a_trace_can_come_at_once_and_without_adapters():
    trace = make_trace(zipf(4, 1.0), rate=2.0, requests=20)
    offered, bare = at_once(trace), without_adapters(trace)
    assert {arrival.at_s for arrival in offered} == {0.0}
    assert {arrival.adapter for arrival in bare} == {None}
    assert [a.output_tokens for a in offered] == [a.output_tokens for a in trace]
    assert [(a.at_s, a.prompt_tokens) for a in bare] == [(a.at_s, a.prompt_tokens) for a in trace]
