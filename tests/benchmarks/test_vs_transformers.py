"""The comparison's arithmetic and choices, with children that answer from a table."""

import pytest

from benchmarks import results
from benchmarks.vs_transformers import HF_BATCHING, Contestant, equal_fraction, record


class SlowUnlessUnmixed:
    """Stands for a child process: batches of one adapter are quickest."""

    def ask(self, op, *, requests, new_tokens, batch=1, mixed=False):
        seconds = 2.0 if mixed else 1.0
        return {"seconds": seconds, "first_token_s": 0.5, "cpu_s": 2 * seconds, "tokens": []}


def contestant(side):
    return Contestant(side=side, dtype="float32", child=SlowUnlessUnmixed(), versions={"x": "1"})


ROUNDS = {"throughput": [[], []], "latency": [[], []], "latency_base": [[], []]}


def test_transformers_is_measured_at_its_quickest_batching():
    theirs = contestant("transformers")
    theirs.warm_up(ROUNDS)
    assert theirs.options["throughput"] == HF_BATCHING[-1]
    assert theirs.options["latency"] == {"batch": 1, "mixed": False}


def test_a_record_holds_the_median_and_all_rounds():
    ours = contestant("valora_jax")
    ours.options["throughput"] = {}
    ours.answers["throughput"] = [
        {"seconds": s, "first_token_s": s / 4, "cpu_s": 2 * s, "tokens": []} for s in (4, 2, 8)
    ]
    line = record(ours, "throughput", "demo")
    assert (line["tokens_per_s"], line["latency_s"]) == (16 * 32 / 4, 4)
    assert (line["first_token_s"], line["cpu_s"], line["rounds_s"]) == (1, 8, [4, 2, 8])
    assert line["adapters"] == {"rank8a": 8, "rank8b": 8, "rank16": 16, "rank64": 64}


@pytest.mark.parametrize(
    ("ours", "theirs", "share"),
    [([[1, 2], [3, 4]], [[1, 2], [3, 4]], 1.0), ([[1, 2], [3, 4]], [[1, 0], [3, 4]], 0.75)],
)
def test_equal_tokens_are_counted_by_position(ours, theirs, share):
    assert equal_fraction([{"tokens": ours}], [{"tokens": theirs}]) == share


def test_results_are_appended_as_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "device", lambda: "Some CPU @ 2.0 GHz, 2 cores")
    path = results.results_file("bench")
    results.append(path, [{"a": 1}])
    results.append(path, [{"a": 2}])
    assert path == tmp_path / "some-cpu-2-0-ghz-2-cores" / "bench.jsonl"
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'
