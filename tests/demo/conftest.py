import pytest

from tests.demo.tiny_sources import write_gguf
from valora_jax.demo.smollm2 import SmolLM2


@pytest.fixture
def tiny(tmp_path):
    """The float32 weights of a GGUF file of one layer, and the `SmolLM2` that reads it."""
    path = tmp_path / "tiny.gguf"
    weights = write_gguf(path)
    return weights, SmolLM2(path)
