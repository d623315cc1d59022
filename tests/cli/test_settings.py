"""TOML files of settings: differences only, every fault named, and the files of configs/."""

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.cli.tiny_engine import ROOT
from valora_jax.cli.generate import defaults
from valora_jax.cli.settings import config_argument, with_file
from valora_jax.config import EngineConfig
from valora_jax.engine.memory_plan import MemoryPlan
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.lora.device import DeviceAdapters
from valora_jax.models.llava15.config import LLAVA_1_5_7B
from valora_jax.models.llava15.spec import spec_of
from valora_jax.models.llava15.weights import parameter_count

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
# What JAX takes of an 80 GB GPU by default.
DEVICE_BYTES = int(0.75 * 79.6 * 2**30)
LINEARS_BYTES = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # of the decoder, what the copy holds


def read(tmp_path, text):
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return with_file(path, {"engine": EngineConfig(), "sampling": SamplingParams(top_k=3)})


def test_a_file_holds_differences(tmp_path):
    found = read(tmp_path, "[engine]\nmax_requests = 3\ncompile_cache = 'x'\n[sampling]\ntop_p = 1")
    assert found["engine"] == EngineConfig(
        max_requests=3, compile_cache=found["engine"].compile_cache
    )
    assert str(found["engine"].compile_cache) == "x"
    assert found["sampling"] == SamplingParams(top_k=3, top_p=1)


def test_none_is_written_as_in_flags(tmp_path):
    found = read(tmp_path, "[engine]\ncompile_cache = 'None'\n[sampling]\nmax_tokens = 'None'")
    assert found["engine"].compile_cache is None
    assert found["sampling"].max_tokens is None


def test_every_fault_of_a_file_is_named(tmp_path):
    text = (
        "kv_pages = 1\n[engine]\nmax_request = 3\nmax_adapters = 'x'\nwarm_up = 1\n"
        "dtype = 'int8'\n[server]\nport = 1\n[sampling]\nstop = [1]"
    )
    with pytest.raises(ValueError, match="does not fit") as error:
        read(tmp_path, text)
    for part in (
        "no table [kv_pages]; known: [engine], [sampling]",
        "no table [server]",
        "[engine] has no key 'max_request'; known: dtype, kernels, max_requests,",
        "[engine] max_adapters = 'x', want int",
        "[engine] warm_up = 1, want bool",
        "[engine] dtype = 'int8', want",
        "[sampling] stop = [1], want",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[engine", "is not TOML"),
        ("engine = 3", r"write a table \[engine\]"),
        ("[engine]\nmax_requests = 0", r"settings.toml: the engine's settings are wrong"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_the_config_flag_is_found_in_both_forms():
    for arguments in (["generate", "m", "--config", "a.toml"], ["generate", "--config=a.toml"]):
        assert str(config_argument(arguments)) == "a.toml"
    assert config_argument(["generate", "m"]) is None
    assert config_argument(["generate", "m", "--config"]) is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_file_of_configs_is_valid(path):
    assert defaults(path).engine != EngineConfig()


def test_the_7b_file_fits_an_80_gb_gpu():
    config = defaults(ROOT / "configs" / "gpu-7b.toml").engine
    spec, dtype = spec_of(LLAVA_1_5_7B), np.dtype(bfloat16)
    weights_bytes = parameter_count(LLAVA_1_5_7B) * dtype.itemsize
    plan = MemoryPlan.make(
        config,
        spec,
        dtype=dtype,
        weights_bytes=weights_bytes,
        copy_bytes=LINEARS_BYTES,
        adapters_bytes=DeviceAdapters.size_bytes(config, spec.adapter_target, dtype=dtype),
        staged_bytes=DeviceAdapters.staged_bytes(config, spec.adapter_target, dtype=dtype),
        free_bytes=DEVICE_BYTES - weights_bytes,
    )
    assert plan.kv_pages == 724
    assert plan.copy_bytes == LINEARS_BYTES
    assert plan.adapters_bytes == pytest.approx(6.8e9, rel=0.01)
    taken_bytes = (
        plan.weights_bytes
        + plan.copy_bytes
        + plan.adapters_bytes
        + plan.staged_bytes
        + plan.features_bytes
        + plan.sampler_bytes
        + plan.kv_pages * plan.page_bytes
    )
    assert taken_bytes < DEVICE_BYTES - 4e9  # what a step's own arrays need
