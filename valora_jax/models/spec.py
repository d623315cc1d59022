"""What the engine must know of a model, whatever its family."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from jax.typing import DTypeLike

from valora_jax.layers.attention import KVCursor
from valora_jax.lora.adapter import AdapterTarget
from valora_jax.lora.batch import LoraBatch
from valora_jax.models.weight_map import Entry

# The LoRA site of the output head, in every family: the engine adds it after replaced heads.
HEAD_SITE = "head"


class Model(Protocol):
    """The forward pass in the engine's terms; see `models.llava15.modeling` for the shapes."""

    def encode_images(self, pixels_I3hw: jax.Array, *, lora: LoraBatch | None) -> jax.Array: ...

    def embed(
        self, token_T: jax.Array, *, features_FD: jax.Array, feature_row_T: jax.Array
    ) -> jax.Array: ...

    def decode(
        self, x_TD: jax.Array, position_T: jax.Array, *, cursor: KVCursor, lora: LoraBatch | None
    ) -> jax.Array: ...

    def logits(self, hidden_TD: jax.Array) -> jax.Array: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A model of known sizes, before it has weights.

    Attributes:
      model_type: as in `config.json`.
      build: makes the module with random weights of a dtype; trace it with `nnx.eval_shape`.
      entries: the weight map.
      canonical_name: maps a checkpoint's tensor names to those of `entries`.
      ignored_names: endings of tensor names that checkpoints hold and nobody needs.
      adapter_target: where adapters attach.
      layers, kv_heads, head_width: the shape of the key-value cache.
      width: of the decoder's hidden states.
      vocab_rows: rows of the embedding; token ids are below it.
      max_positions: tokens a request may have in all.
      image_token, image_token_id: the placeholder in text and its id.
      tokens_per_image: decoder positions an image takes.
      vision_tokens_per_image: rows an image has inside the tower.
      pixel_shape: of one preprocessed image, `(3, height, width)`.
      stored_dtype: what the checkpoint says its weights are, if it does.
    """

    model_type: str
    build: Callable[..., Model]
    entries: Sequence[Entry]
    canonical_name: Callable[[str], str]
    ignored_names: tuple[str, ...]
    adapter_target: AdapterTarget
    layers: int
    kv_heads: int
    head_width: int
    width: int
    vocab_rows: int
    max_positions: int
    image_token: str
    image_token_id: int
    tokens_per_image: int
    vision_tokens_per_image: int
    pixel_shape: tuple[int, int, int]
    stored_dtype: DTypeLike | None


SpecReader = Callable[[Mapping[str, Any]], ModelSpec]
