"""Filling a device's table, with a device that is a formula."""

import io
import itertools

import jax
import pytest
from rich.console import Console

from pallas_kernels.lora_matmul.measure import DeviceLostError
from pallas_kernels.lora_matmul.tune import SPACES, is_done, key_of
from pallas_kernels.lora_matmul.tuned import KINDS
from pallas_kernels.tuning import __main__, run
from pallas_kernels.tuning.shapes import MODELS
from pallas_kernels.tuning.table import Table, path_of

DEVICE = "NVIDIA H100 80GB HBM3"
TASKS = run.tasks(["llava-1.5-7b"], only="/t8/")


def formula(task, tiles):
    """Few adapters like splits, more of them do not; four stages fail."""
    return {tile: _outcome(task, tile) for tile in tiles}


def _outcome(task, tile):
    shrink = tile.shrink
    if shrink.stages == 4:
        return "spills"
    us = {"few": 10 + 32 / shrink.splits, "some": 20.0 + 2 * shrink.splits}
    if task.tokens >= 32:
        us["many"] = 40.0 + 4 * shrink.splits
    return {segments: round(time + shrink.warps, 2) for segments, time in us.items()}


class Formula:
    """Measurements of a task without a device."""

    def __init__(self, task, measure=formula):
        self.task, self.measure = task, measure

    def start(self, tiles):
        self.tiles = tiles

    def finish(self):
        return self.measure(self.task, self.tiles)


def new_table() -> Table:
    return Table(device=DEVICE, jax=jax.__version__, kinds=KINDS)


def fill(path, *, measure=formula, tasks=TASKS, seconds=(0,), table=None):
    """Runs searches; returns what was printed."""
    out = io.StringIO()
    if table is None:
        table = Table.read(path, device=DEVICE, kinds=KINDS) if path.exists() else new_table()
    run.run(
        tasks,
        table,
        path,
        measure=lambda task: Formula(task, measure),
        until_s=60,
        console=Console(file=out, width=200),
        clock=itertools.chain(seconds, itertools.repeat(seconds[-1])).__next__,
    )
    return out.getvalue()


def names_in(path) -> set[str]:
    table = Table.read(path, device=DEVICE, kinds=KINDS)
    return {f"{k.width}-{k.columns}/t{k.tokens}/h{h}" for k, h in table.entries}


def test_every_class_gets_its_own_best_tile_and_any_the_best_compromise(tmp_path):
    task, table = TASKS[0], new_table()
    fill(tmp_path / "t.json", tasks=[task], table=table)
    found = {k.segments: e for (k, _), e in table.entries.items()}
    assert found.keys() == {"few", "some", "any"}  # 8 rows cannot bring 32 adapters
    for segments, entry in found.items():
        assert SPACES[task.op].legal(entry.tile, task)
        assert entry.tile.shrink.warps == 2
        if segments != "any":
            assert entry.us == _outcome(task, entry.tile)[segments]
    splits = [found[segments].tile.shrink.splits for segments in ("some", "any", "few")]
    assert splits == sorted(splits)
    assert splits[0] < splits[2]
    assert {s.reason for s in table.skipped} == {"spills"}


def test_what_the_table_has_is_not_measured_again(tmp_path):
    path, measured = tmp_path / "t.json", []

    def counted(task, tiles):
        measured.append(task.name)
        return formula(task, tiles)

    fill(path, measure=counted, tasks=TASKS[:1])
    first, entries = set(measured), path.read_text()
    measured.clear()
    fill(path, measure=counted)
    assert first == {TASKS[0].name}
    assert set(measured) == {task.name for task in TASKS[1:]}
    assert all(line.rstrip(",") in path.read_text() for line in entries.splitlines())
    measured.clear()
    whole = path.read_bytes()
    fill(path, measure=counted)
    assert (measured, path.read_bytes()) == ([], whole)


def test_an_interrupted_search_keeps_what_was_done(tmp_path):
    def interrupted(task, tiles):
        if task == TASKS[3]:  # which begins when another ends
            raise KeyboardInterrupt
        return formula(task, tiles)

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "t.json", measure=interrupted)
    assert len(names_in(tmp_path / "t.json")) >= 1


def test_when_time_is_up_the_rest_is_left(tmp_path):
    printed = fill(tmp_path / "t.json", seconds=[0, 0, 59, 60])
    assert "time is up; 2 searches are left" in printed
    assert len(names_in(tmp_path / "t.json")) == 2


def test_after_one_model_only_the_best_height_is_searched(tmp_path):
    def low_is_fast(task, tiles):
        times = {"few": 1.0 * task.block_rows, "many": 5.0}
        return dict.fromkeys(tiles, times)

    wanted = run.tasks(["llava-1.5-7b", "llava-1.5-13b"], only="/t512/")
    printed = fill(tmp_path / "t.json", tasks=wanted, measure=low_is_fast)
    table = Table.read(tmp_path / "t.json", device=DEVICE, kinds=KINDS)
    assert "12 searches, " in printed
    assert {key.width for key, height in table.entries if height == 64} == {4096, 11008}
    assert {key.width for key, height in table.entries if height == 32} > {4096, 5120}
    assert all(is_done(task, table) for task in wanted)


def test_a_tile_that_brings_the_device_down_is_left_out_by_the_next_start(tmp_path):
    path, tried, deadly = tmp_path / "t.json", [], []

    def measure(task, tiles):
        for tile in tiles:
            tried.append(tile)
            if len(tried) == 3 and not deadly:
                deadly.append(tile)
            if tile in deadly:
                raise DeviceLostError(tile, "illegal address")
        return formula(task, tiles)

    with pytest.raises(DeviceLostError, match="illegal address; start again"):
        fill(path, measure=measure, tasks=TASKS[:1])
    assert names_in(path) == set()
    tried.clear()
    fill(path, measure=measure, tasks=TASKS[:1])
    assert tried
    assert deadly[0] not in tried
    assert names_in(path) == {"4096-12288/t8/h16"}


def test_a_shape_without_a_working_tile_is_named_and_has_no_entry(tmp_path):
    printed = fill(tmp_path / "t.json", measure=lambda task, tiles: dict.fromkeys(tiles, "no"))
    assert f"{TASKS[0].name}: no tile works" in printed
    assert names_in(tmp_path / "t.json") == set()
    fill(tmp_path / "t.json", measure=formula)  # and the next start does not meet it again
    table = Table.read(tmp_path / "t.json", device=DEVICE, kinds=KINDS)
    assert len({(s.key, s.tile) for s in table.skipped}) == len(table.skipped)


def test_models_of_equal_shapes_are_searched_once():
    assert run.tasks(["llava-1.5-7b"]) == run.tasks(["qwen-vl-7b", "llava-1.5-7b"])
    all_names = [task.name for task in run.tasks([])]
    assert len(all_names) == len(set(all_names))
    assert {t.linear for t in run.tasks([])} == {
        linear for model in MODELS.values() for linear in model.linears.values()
    }


def test_steps_that_are_rare_are_searched_for_the_first_model_alone():
    both = ["llava-1.5-7b", "qwen2.5-vl-7b"]
    for models in (both, both[::-1]):
        rare = {t.linear for t in run.tasks(models) if t.tokens in (1, 128)}
        assert rare == set(MODELS[models[0]].linears.values())
        assert {t.linear for t in run.tasks(models) if t.tokens == 8} > rare


def test_the_shipped_table_has_every_search():
    path = path_of(DEVICE)
    table = Table.read(path, device=DEVICE, kinds=KINDS)
    assert [task.name for task in run.tasks([]) if not is_done(task, table)] == []


def test_only_chooses_by_name():
    (task,) = run.tasks(["llava-1.5-7b"], only="4096-4096/t8/")
    assert (task.name, key_of(task).columns) == ("linear/4096-4096/t8/h16", 4096)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (dict(models=["gpt-7"]), "unknown models: gpt-7; known: llava-1.5-7b"),
        (dict(models=[], only="("), "no regular expression"),
    ],
)
def test_a_wrong_choice_is_named(choice, message):
    with pytest.raises(ValueError, match=message):
        run.tasks(**choice)


def test_off_a_gpu_there_is_one_clear_message(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    message = "measured on an NVIDIA GPU, but jax runs on 'cpu' here"
    with pytest.raises(NotImplementedError, match=message):
        run.tune()
    with pytest.raises(SystemExit, match=message):
        __main__.main([])
