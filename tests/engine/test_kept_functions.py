"""Functions that one start compiles, and the next one loads."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from valora_jax.engine import step
from valora_jax.engine.batch import BatchLayout
from valora_jax.engine.kept_functions import KeptFunctions
from valora_jax.engine.step_functions import Call, StepFunctions
from valora_jax.models.build import abstract_model
from valora_jax.models.llava15.config import LLAVA_1_5_7B
from valora_jax.models.llava15.spec import spec_of

X_T = np.arange(3, dtype=np.float32)
traced = []


def scaled(factor, x_T):
    traced.append(factor)
    return {"product": factor * x_T, "sum": x_T.sum()}


def traced_by_start(folder, *factors, x_T=X_T) -> list[int]:
    """The factors that were traced, once all functions are ready and right."""
    traced.clear()
    functions, reports = StepFunctions(KeptFunctions(folder)), [(0, 2 * len(factors))]
    calls = [Call(scaled, factor, dict(x_T=x_T)) for factor in factors]
    functions.compile_together(calls, lambda *report: reports.append(report))
    assert reports == sorted(reports)
    assert functions.traces == len(factors)
    for factor in factors:
        got = functions.of(scaled, factor)(x_T=x_T)
        np.testing.assert_array_equal(got["product"], factor * x_T)
        assert got["sum"] == x_T.sum()
    return list(traced)


def test_the_next_start_traces_what_is_new(tmp_path):
    assert traced_by_start(tmp_path, 2, 3) == [2, 3]
    assert traced_by_start(tmp_path, 2, 3, 4) == [4]
    assert traced_by_start(tmp_path, 2, 3, 4) == []
    assert traced_by_start(tmp_path, 2, x_T=np.append(X_T, X_T)) == [2]
    assert traced_by_start(tmp_path, 2, x_T=X_T.astype(np.int32)) == [2]


@pytest.fixture
def jax_cache(tmp_path):
    """A cache of jax's own that keeps everything."""
    ours = {
        "jax_compilation_cache_dir": str(tmp_path / "jax"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in ours}
    for name, value in ours.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path / "jax"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_nothing_comes_from_the_cache_of_jax(tmp_path, jax_cache):
    arguments = dict(x_T=X_T)
    StepFunctions().compile_together([Call(scaled, 2, arguments)], lambda *_: None)
    known = list(jax_cache.iterdir())
    assert known
    assert traced_by_start(tmp_path / "ours", 2, 3) == [2, 3]
    assert traced_by_start(tmp_path / "ours", 2, 3) == []
    assert list(jax_cache.iterdir()) == known
    StepFunctions().compile_together([Call(scaled, 4, arguments)], lambda *_: None)
    assert len(list(jax_cache.iterdir())) > len(known)


def test_other_settings_write_over_what_is_kept(tmp_path, monkeypatch):
    traced_by_start(tmp_path, 2)
    files = sorted(tmp_path.iterdir())
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    assert traced_by_start(tmp_path, 2) == [2]
    assert sorted(tmp_path.iterdir()) == files
    assert traced_by_start(tmp_path, 2) == []


@pytest.mark.parametrize("kept_bytes", [0, 40, 600])
def test_a_torn_file_is_compiled_anew(tmp_path, kept_bytes, caplog):
    traced_by_start(tmp_path, 2)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:kept_bytes])
    assert traced_by_start(tmp_path, 2) == [2]
    assert f"{file} is compiled anew" in caplog.text
    assert traced_by_start(tmp_path, 2) == []


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path, caplog):
    (tmp_path / "file").touch()
    assert traced_by_start(tmp_path / "file", 2) == [2]
    assert "is not kept for the next start" in caplog.text


def test_a_cpu_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert KeptFunctions.on_this_device(tmp_path) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert KeptFunctions.on_this_device(tmp_path) is not None
    assert KeptFunctions.on_this_device(None) is None


def shape_of(**decoder) -> step.StepShape:
    """A step's shape, of a decoder that is small but for what is said."""
    decoder = dataclasses.replace(LLAVA_1_5_7B.decoder, layers=1, **decoder)
    spec = spec_of(dataclasses.replace(LLAVA_1_5_7B, decoder=decoder))
    graphdef, state = nnx.split(abstract_model(spec, dtype=np.float32), nnx.Param)
    model = step.ModelShape(graphdef=graphdef, treedef=jax.tree.structure(state), layers=1)
    layout, dtype = BatchLayout.of_images(1, vision_tokens=4), np.dtype(np.float32)
    return step.StepShape(model=model, layout=layout, with_lora=True, dtype=dtype, kernel="xla")


def test_shapes_that_trace_alike_are_called_alike():
    known = repr(shape_of())
    assert repr(shape_of()) == known
    assert " at 0x" not in known  # no start would find what another one kept
    assert repr(shape_of(norm_eps=1e-3)) != known
    assert repr(dataclasses.replace(shape_of(), with_lora=False)) != known
