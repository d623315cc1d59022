"""The whole of `valora bench replay`, simulated: files, table, plots, and the same again."""

import json

import matplotlib.image
import pytest

from valora_jax.replay import plots, records
from valora_jax.replay.report import Slo
from valora_jax.replay.run import run
from valora_jax.replay.settings import ReplaySettings
from valora_jax.replay.systems import SimulatedSystem

SWEEP = dict(simulate=True, adapters=(4,), skews=(0.5,), rates=(4.0, 8.0), at_once=True, seconds=2)


def replayed(**flags):
    return run(ReplaySettings(**SWEEP | flags), command="valora bench replay")


def test_every_trace_is_replayed_under_every_policy(capsys, tmp_path):
    got = replayed(output=tmp_path / "new" / "records.jsonl")
    names = [record["name"] for record in got]
    assert len(set(names)) == len(names) == 3 * 5
    assert names[0] == "simulated-llava-1.5-7b/retrieval/a4/r64/all/skew-0.5/rate-4/no-adapters"
    captured = capsys.readouterr()
    assert all(name in captured.err for name in names)
    for part in ("rate-8: 16 requests", "no adapters", "valora", "dlora", "TTFT", "un/mer/mix"):
        assert part in captured.out
    lines = (tmp_path / "new" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == json.loads(json.dumps(got))


def test_a_record_says_what_it_is_of():
    record = replayed(policies=("valora",), bound=False, at_once=False, ranks=(8, 64))[0]
    assert record["simulated"]
    assert (record["device"], record["model"]) == ("simulated H100", "llava-1.5-7b")
    assert record["command"] == "valora bench replay"
    assert (record["policy"], record["rate"], record["load"]) == ("valora", 4.0, None)
    assert record["series"] == "retrieval, 4 adapters of rank 8, 64, skew 0.5"
    assert record["requests"] == 8
    assert "simulator_error_percent" not in record
    assert record["jax"]


def test_equal_settings_give_equal_records():
    few = dict(rates=(6.0,), policies=("valora", "dlora"))
    assert replayed(**few) == replayed(**few)
    assert replayed(**few) != replayed(**few, seed=1)


def test_adapters_slow_a_device_down_and_more_so_on_all_linears():
    def mean(record):
        return record["token_ms"]["mean"]

    of = dict(rates=(8.0,), at_once=False, policies=("unmerged",))
    bound, everywhere = replayed(**of)
    [_, attention] = replayed(**of, targets="attention")
    assert mean(bound) < mean(attention) < mean(everywhere)


def test_a_capacity_can_be_given(capsys):
    of = dict(rates=(), loads=(0.5,), policies=("valora",), bound=False, at_once=False)
    [given] = replayed(**of, capacity=8.0)
    assert (given["load"], given["rate"]) == (0.5, 4.0)
    assert "loads are of the 8.00 given" in capsys.readouterr().err
    [found] = replayed(**of)
    assert found["rate"] == pytest.approx(6.2, abs=0.2)


def test_the_bound_is_replayed_once_for_all_spreads(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "valora_jax.replay.systems.SimulatedSystem.predict",
        lambda self, trace, policy: asked.append(policy),
    )
    got = replayed(skews=(0.1, 0.9), policies=("merged",))
    assert (len(got), asked.count("unmerged"), asked.count("merged")) == (12, 3, 6)


def test_plots_are_drawn_from_records(tmp_path):
    few = dict(rates=(4.0,), policies=("valora",))
    replayed(output=tmp_path / "records.jsonl", plots=tmp_path / "plots", **few)
    at_once = (
        tmp_path
        / "plots"
        / ("timeline-simulated-llava-1.5-7b-retrieval-a4-r64-all-skew-0.5-at-once.png")
    )
    assert len(list((tmp_path / "plots").iterdir())) == 1 + 2
    assert matplotlib.image.imread(at_once).ndim == 3
    again = plots.draw(records.read(tmp_path / "records.jsonl"), tmp_path / "again")
    assert again[0].name == "latency.png"
    assert len(again) == 3


def test_settings_that_change_the_figures_are_in_the_names(tmp_path, monkeypatch):
    # --simulate takes no --resident.
    monkeypatch.setattr("valora_jax.replay.run._system", SimulatedSystem)
    path = tmp_path / "records.jsonl"
    few = dict(
        simulate=False,
        shapes="llava-1.5-7b",
        output=path,
        policies=("unmerged",),
        bound=False,
        at_once=False,
        rates=(4.0,),
    )
    for flags in (dict(), dict(seed=1), dict(resident=2), dict(cv=2.0)):
        replayed(**few | flags)
    found = records.read(path)
    assert len(found) == 4
    assert len({record["series"] for record in found}) == 4


def test_records_of_one_name_count_once(tmp_path):
    path = tmp_path / "records.jsonl"
    for ttft_ms in (100.0, 200.0):
        replayed(output=path, policies=(), slo=Slo(ttft_ms=ttft_ms), at_once=False)
    assert [record["slo"]["ttft_ms"] for record in records.read(path)] == [200.0, 200.0]


def test_a_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"name": "a"}\nnonsense\n')
    with pytest.raises(ValueError, match=r"records\.jsonl:2 is no record of a replay"):
        records.read(path)


def test_nothing_to_draw_is_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="there is no record to draw"):
        plots.draw([], tmp_path)


def test_plots_without_matplotlib_are_refused_before_the_replay(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"plots need matplotlib.*valora bench plot"):
        replayed(plots=tmp_path, output=tmp_path / "records.jsonl")
    assert not (tmp_path / "records.jsonl").exists()
