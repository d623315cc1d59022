"""The smallest engine on the tiny golden checkpoint: few shapes, quick to compile."""

import pathlib

from valora_jax.config import EngineConfig

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens"
MODEL = GOLDENS / "checkpoints" / "llava15-tiny"
ADAPTERS = GOLDENS / "adapters"
IMAGES = GOLDENS / "text" / "images"

SMALL = dict(
    dtype="float32",
    max_requests=2,
    max_tokens_per_step=64,
    max_request_tokens=256,
    max_adapters=2,
    lora_pages=8,
    warm_up=False,
)
CONFIG = EngineConfig(**SMALL)
FLAGS = [
    part
    for name, value in SMALL.items()
    if name != "warm_up"
    for part in (f"--engine.{name.replace('_', '-')}", str(value))
]
