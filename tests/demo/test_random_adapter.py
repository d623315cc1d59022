"""Random adapters: they fit the model, are reproducible, and cover the decoder."""

import pathlib

from valora_jax.demo.random_adapter import write_random_adapter
from valora_jax.lora.read import read_adapter
from valora_jax.models import read_spec
from valora_jax.models.loading import read_config

MODEL = pathlib.Path(__file__).parents[1] / "goldens" / "checkpoints" / "llava15-tiny-gqa"


def test_it_binds_to_every_linear_of_the_decoder(tmp_path):
    folder = write_random_adapter(tmp_path / "a", model=MODEL, rank=3, seed=1)
    target = read_spec(read_config(MODEL)).adapter_target
    adapter = read_adapter(folder, name="a", target=target)
    decoder = {site.name for site in target.sites if site.name.startswith("decoder.")}
    assert adapter.pairs.keys() == decoder
    assert {pair.rank for pairs in adapter.pairs.values() for pair in pairs.values()} == {3}


def test_equal_arguments_write_equal_bytes_and_seeds_differ(tmp_path):
    folders = [
        write_random_adapter(tmp_path / name, model=MODEL, rank=2, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert a == b != c
