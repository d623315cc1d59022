import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.engines import CONFIG, GOLDENS
from valora_jax.config import EngineConfig
from valora_jax.media.detokenizer import IncrementalDetokenizer
from valora_jax.models.build import abstract_model, parameter_paths
from valora_jax.models.llava15.config import Llava15Config
from valora_jax.models.llava15.spec import spec_of
from valora_jax.replay import random_model
from valora_jax.replay.random_model import random_parts, random_tokenizer

TINY = Llava15Config.from_hf(
    json.loads((GOLDENS / "checkpoints" / "llava15-tiny" / "config.json").read_text())
)


@pytest.fixture(scope="module")
def weights():
    model = random_model.random_model(spec_of(TINY), dtype=jnp.bfloat16)
    return {path: leaf.get_value() for path, leaf in parameter_paths(model).items()}


def test_every_weight_is_there_in_its_dtype(weights):
    abstract = parameter_paths(abstract_model(spec_of(TINY), dtype=jnp.bfloat16))
    assert {path: w.shape for path, w in weights.items()} == {
        path: leaf.get_value().shape for path, leaf in abstract.items()
    }
    assert {w.dtype for w in weights.values()} == {jnp.dtype(jnp.bfloat16)}


def test_linears_keep_the_size_of_what_they_are_given(weights):
    matrix = weights["projector.down.kernel"].astype(np.float32)
    assert matrix.std() == pytest.approx(matrix.shape[0] ** -0.5, rel=0.2)
    for path, weight in weights.items():
        assert path.endswith("bias") == (not weight.any()), path


def test_no_two_weights_are_alike(weights):
    shapes: dict = {}
    for weight in weights.values():
        if weight.ndim > 1:
            shapes.setdefault(weight.shape, []).append(np.asarray(weight, np.float32))
    for same in shapes.values():
        assert len({array.tobytes() for array in same}) == len(same)


def test_an_engine_can_be_made_without_files(monkeypatch):
    monkeypatch.setattr(random_model, "_CONFIGS", {"llava-1.5-7b": TINY})
    config = EngineConfig(
        dtype="float32",
        max_requests=2,
        max_tokens_per_step=64,
        max_request_tokens=CONFIG.max_request_tokens,
        kv_pages=17,
        max_adapters=1,
        lora_pages=4,
        compile_cache=None,
        warm_up=False,
    )
    parts = random_parts("llava-1.5-7b", config, show_progress=False)
    assert parts.memory.kv_pages == 17
    assert parts.tokenizer.vocab_size == parts.spec.vocab_rows
    assert parts.pixels.output_size == parts.spec.pixel_shape[1:]


def test_kernels_of_another_device_are_refused_before_weights_are_made(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    monkeypatch.setattr(random_model, "random_model", None)
    config = EngineConfig(dtype="float32", kernels="triton")
    with pytest.raises(NotImplementedError, match="runs on NVIDIA GPUs only"):
        random_parts("llava-1.5-7b", config, show_progress=False)


def test_tokens_become_text_on_the_way():
    tokenizer = random_tokenizer(100)
    text = IncrementalDetokenizer(tokenizer)
    assert "".join([text.add(7), text.add(42), text.finish()]) == "w7 w42"
    assert tokenizer.decode([7, 42]) == "w7 w42"
    assert tokenizer.stop_token_ids == ()


def test_published_sizes_are_known():
    for config in random_model._CONFIGS.values():
        paths = parameter_paths(abstract_model(spec_of(config), dtype=jnp.bfloat16))
        total = sum(leaf.get_value().size for leaf in paths.values())
        assert 7.0e9 < total < 13.5e9
