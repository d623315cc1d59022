"""LLaVA-1.5 as the engine sees it."""

import functools
from collections.abc import Mapping
from typing import Any

from valora_jax.models.llava15.config import Llava15Config
from valora_jax.models.llava15.modeling import Llava15
from valora_jax.models.llava15.names import IGNORED, canonical
from valora_jax.models.llava15.sites import adapter_target
from valora_jax.models.llava15.weights import entries
from valora_jax.models.spec import ModelSpec


def spec_of(cfg: Llava15Config) -> ModelSpec:
    """Describes a model of this size."""
    vision, decoder = cfg.vision, cfg.decoder
    return ModelSpec(
        model_type="llava",
        build=functools.partial(Llava15, cfg),
        entries=entries(cfg),
        canonical_name=canonical,
        ignored_names=IGNORED,
        adapter_target=adapter_target(cfg),
        layers=decoder.layers,
        kv_heads=decoder.kv_heads,
        head_width=decoder.head_width,
        width=decoder.width,
        vocab_rows=decoder.vocab_rows,
        max_positions=decoder.max_positions,
        image_token="<image>",
        image_token_id=cfg.image_token_id,
        tokens_per_image=cfg.tokens_per_image,
        vision_tokens_per_image=1 + vision.patches,
        pixel_shape=(3, vision.image_size, vision.image_size),
        stored_dtype=cfg.dtype,
    )


def read_spec(hf: Mapping[str, Any]) -> ModelSpec:
    """Reads a parsed `config.json`; raises what `Llava15Config.from_hf` raises."""
    return spec_of(Llava15Config.from_hf(hf))
