"""Plots from sample records: what is drawn, and what is left out."""

import json

import pytest

from benchmarks import plots


def lora(impl, batch, **more):
    fields = dict(op="lora", shape=plots.SQUARE, adapters=8, rank=64, flops=4e9, bytes=1e9)
    name = f"{plots.SQUARE}/t{batch}/a8/r64/{impl}"
    return (
        fields
        | dict(
            name=name, impl=impl, batch=batch, median_ms=0.02, added_ms=0.01, added_floor_ms=0.005
        )
        | more
    )


def step(lora, batch):
    fields = dict(op="decode", model="llava-1.5-7b", kv_tokens=800, impl="triton", floor_ms=5.5)
    return fields | dict(name=f"{lora}{batch}", lora=lora, batch=batch, median_ms=6.5)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_newest_record_of_a_name_counts_and_failures_are_left_out(tmp_path):
    old, failed = lora("loop", 8), lora("triton", 8)
    del failed["median_ms"]
    write(tmp_path / "x.jsonl", [old, failed, old | {"median_ms": 2}])
    assert [r["median_ms"] for r in plots.read(tmp_path / "x.jsonl")] == [2]
    assert plots.read(tmp_path / "missing.jsonl") == []


def test_latency_has_a_panel_a_rank_and_a_line_an_implementation_and_the_floor():
    records = [lora(impl, t) for impl in ("triton", "loop") for t in (32, 8)]
    mixed = lora("triton", 32, rank=[8, 64], name="mixed")
    figure = plots.latency([*records, mixed, lora("triton", 8, rank=128, name="other")])
    assert figure is not None
    first, second = figure.axes
    assert [panel.get_title() for panel in figure.axes] == [
        "8 adapters of rank 64",
        "8 adapters of rank 128",
    ]
    assert len(first.lines) == 3
    assert len(second.lines) == 2
    assert list(first.lines[0].get_xdata()) == [8, 32]
    assert list(first.lines[0].get_ydata()) == pytest.approx([10, 10])  # microseconds


def test_a_panel_without_records_stays_empty(tmp_path):
    write(tmp_path / "kernels.jsonl", [lora("triton", 8), lora("triton", 32, adapters=32, rank=8)])
    assert "lora_latency.png" in [path.name for path in plots.draw(tmp_path)]


def test_the_roofline_shows_our_kernels_alone():
    merge = lora("mosaic", 0, op="merge", median_ms=0.04)
    figure = plots.roofline([lora("triton", 8), lora("loop", 8), merge])
    assert figure is not None
    intensities, tflops = zip(
        *(of.get_offsets()[0] for of in figure.axes[0].collections), strict=True
    )
    assert intensities == pytest.approx((4, 4))
    assert sorted(tflops) == pytest.approx([100, 200])


def test_every_figure_that_has_records_is_written(tmp_path):
    write(tmp_path / "kernels.jsonl", [lora("triton", 8)])
    assert [path.name for path in plots.draw(tmp_path)] == ["lora_latency.png", "roofline.png"]
    write(tmp_path / "decode_step.jsonl", [step("none", 8), step("each", 8), step("unused", 8)])
    written = plots.draw(tmp_path)
    assert [path.name for path in written][2:] == ["decode_step.png"]
    assert all(path.stat().st_size > 10_000 for path in written)


def test_without_records_there_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="no records of a GPU benchmark"):
        plots.main()
