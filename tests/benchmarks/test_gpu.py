"""The frame of the GPU benchmarks on a CPU: selection, records, failures, timing."""

import json
import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks import decode_step, gpu, kernels, results, timing
from benchmarks.floors import Work
from benchmarks.gpu import Options, Program, Recorder, run_group

FIELDS = dict(model="tiny", batch=1, adapters=0, rank=0)


def program(impl, *, run=lambda x, y: (x + y, x), error=0.5):
    return Program(
        name=f"sum/{impl}",
        fields=FIELDS | dict(impl=impl),
        work=Work(bytes=6e6, flops=0),
        run=run,
        carry=lambda: jnp.zeros(4),
        inputs=lambda: (jnp.ones(4),),
        calls=1,
        error=lambda returned: error,
        timing=dict(samples=2, sample_ms=0),
    )


@pytest.fixture
def recorder(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "copy_bytes_per_s", lambda: 2e12)
    return Recorder("kernels")


def records(recorder):
    return [json.loads(line) for line in recorder.path.read_text().splitlines()]


@pytest.mark.parametrize("bench", [kernels, decode_step])
def test_off_a_gpu_a_benchmark_ends_with_one_message(bench, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU, but jax runs on 'cpu' here"):
        bench.main([])


def test_a_record_has_all_that_is_needed_to_read_it_later(recorder):
    run_group([program("triton")], recorder)
    (record,) = records(recorder)
    assert record | FIELDS == record
    assert (record["bench"], record["impl"], record["jax"]) == (
        "kernels",
        "triton",
        jax.__version__,
    )
    assert (record["floor_ms"], record["copy_floor_ms"]) == (0.002, 0.003)
    assert record["median_ms"] > 0
    assert record["command"].startswith("python -m benchmarks.kernels")
    assert record["device"] == jax.devices()[0].device_kind


def refuses(x, y):
    raise NotImplementedError("not this shape; 'xla' takes it")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (dict(error=2.0), "wrong by 2.00 times the tolerance"),
        (dict(error=float("nan")), "wrong by nan"),
        (dict(run=refuses), "not this shape"),
    ],
)
def test_what_fails_is_recorded_without_a_time_and_the_rest_goes_on(recorder, broken, message):
    run_group([program("triton", **broken), program("xla")], recorder)
    by_impl = {record["impl"]: record for record in records(recorder)}
    assert message in by_impl["triton"]["failure"]
    assert "median_ms" not in by_impl["triton"]
    assert by_impl["xla"]["median_ms"] > 0


def test_programs_that_differ_in_data_alone_are_compiled_once(recorder, monkeypatch):
    compiled = []
    compile_ = jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self: compiled.append(self) or compile_(self)
    )
    run_group([program("triton"), program("xla")], recorder)
    assert (len(compiled), len(records(recorder))) == (1, 2)


def test_programs_are_selected_by_a_part_of_their_name():
    options = Options.parse("A bench.", ["--only", "t8/.*triton"])
    assert options.wants("lora/4096-4096/t8/a8/r64/triton")
    assert not options.wants("lora/4096-4096/t8/a8/r64/loop")
    assert Options.parse("A bench.", []).wants("anything")


def test_a_pattern_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        Options.parse("A bench.", ["--only", "t8("])
    assert "'t8(' is no regular expression" in capsys.readouterr().err


def test_time_is_that_of_one_call(monkeypatch):
    now_s = 0.0
    clock = types.SimpleNamespace(perf_counter=lambda: now_s)
    monkeypatch.setattr(timing, "time", clock)

    def run(carry, taken_s):
        nonlocal now_s
        now_s += taken_s
        return carry

    taken = timing.time_program(run, jnp.zeros(1), (0.002,), calls=4, samples=3, sample_ms=5)
    assert 0.5 <= taken.p10_ms <= taken.median_ms <= taken.p90_ms
    assert taken.median_ms < 5  # four calls a run of two milliseconds: not per run, nor per sample
    assert taken.host_fraction > 0.5


@pytest.mark.parametrize(("fraction", "value"), [(0.0, 1), (0.1, 2), (0.5, 6), (0.9, 10)])
def test_quantiles_are_values_that_were_measured(fraction, value):
    assert timing.quantile([11, 1, 10, 2, 9, 3, 8, 4, 7, 5, 6], fraction) == value
