"""LLaVA-1.5: a CLIP tower, a projector and a Llama decoder.

Ported from `transformers.models.llava` and `.llama` (5.17). T flat tokens of a step, F rows of
image features, D decoder width, V vocabulary rows, I images.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from valora_jax.layers.attention import Attention, KVCursor
from valora_jax.layers.linear import Linear
from valora_jax.layers.mlp import GatedMlp
from valora_jax.layers.norm import RMSNorm
from valora_jax.layers.rotary import rotary_angles
from valora_jax.lora.batch import LoraBatch
from valora_jax.models.llava15.clip import Projector, VisionTower
from valora_jax.models.llava15.config import DecoderConfig, Llava15Config


class DecoderBlock(nnx.Module):
    """Pre-norm attention and gated MLP."""

    def __init__(self, cfg: DecoderConfig, *, layer: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(cfg.width, eps=cfg.norm_eps, dtype=dtype)
        self.attention = Attention(
            cfg.width,
            heads=cfg.heads,
            kv_heads=cfg.kv_heads,
            head_width=cfg.head_width,
            layer=layer,
            dtype=dtype,
            rngs=rngs,
        )
        self.post_norm = RMSNorm(cfg.width, eps=cfg.norm_eps, dtype=dtype)
        self.mlp = GatedMlp(cfg.width, mlp_width=cfg.mlp_width, layer=layer, dtype=dtype, rngs=rngs)

    def __call__(
        self, x_TD: jax.Array, angle_Th: jax.Array, *, cursor: KVCursor, lora: LoraBatch | None
    ) -> jax.Array:
        x_TD += self.attention(self.input_norm(x_TD), angle_Th, cursor=cursor, lora=lora)
        return x_TD + self.mlp(self.post_norm(x_TD), lora=lora)


class Decoder(nnx.Module):
    """The language model. A tied head is a transposed copy of the embedding: one row times the
    embedding itself took a CPU six times as long (docs/decisions.md)."""

    def __init__(self, cfg: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.head_width, self.rope_theta = cfg.head_width, cfg.rope_theta
        shape_VD = (cfg.vocab_rows, cfg.width)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape_VD, dtype))
        self.layers = nnx.List(
            DecoderBlock(cfg, layer=i, dtype=dtype, rngs=rngs) for i in range(cfg.layers)
        )
        self.norm = RMSNorm(cfg.width, eps=cfg.norm_eps, dtype=dtype)
        self.head = Linear(cfg.width, (cfg.vocab_rows,), sites=(), dtype=dtype, rngs=rngs)

    def __call__(
        self, x_TD: jax.Array, position_T: jax.Array, *, cursor: KVCursor, lora: LoraBatch | None
    ) -> jax.Array:
        angle_Th = rotary_angles(position_T, head_width=self.head_width, theta=self.rope_theta)
        for layer in self.layers:
            x_TD = layer(x_TD, angle_Th, cursor=cursor, lora=lora)
        return self.norm(x_TD)


class Llava15(nnx.Module):
    """The model as the engine's step uses it: embed, decode, logits; images apart."""

    def __init__(self, cfg: Llava15Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.vision = VisionTower(cfg, dtype=dtype, rngs=rngs)
        self.projector = Projector(cfg, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(cfg.decoder, dtype=dtype, rngs=rngs)

    def encode_images(self, pixels_I3hw: jax.Array, *, lora: LoraBatch | None) -> jax.Array:
        """Returns decoder embeddings `[I, tokens_per_image, D]` of preprocessed pixels.

        `lora` has a row for each vision token, class tokens included, image by image.
        """
        x_ISD = self.vision(pixels_I3hw, lora=lora)
        images, tokens, width = x_ISD.shape
        if lora is not None:
            adapter_IS = lora.adapter_T.reshape(images, -1)[:, :tokens]
            lora = lora.at_rows(adapter_IS.reshape(-1))
        features_TD = self.projector(x_ISD.reshape(-1, width), lora=lora)
        return features_TD.reshape(images, tokens, -1)

    def embed(
        self, token_T: jax.Array, *, features_FD: jax.Array, feature_row_T: jax.Array
    ) -> jax.Array:
        """Embeds tokens; those with a feature row (>= 0) take that row of image features."""
        x_TD = self.decoder.embedding[...][token_T]
        feature_TD = features_FD[feature_row_T].astype(x_TD.dtype)
        return jnp.where((feature_row_T >= 0)[:, None], feature_TD, x_TD)

    def decode(
        self, x_TD: jax.Array, position_T: jax.Array, *, cursor: KVCursor, lora: LoraBatch | None
    ) -> jax.Array:
        """Returns `[T, D]` hidden states after the final norm; keys and values go to `cursor`."""
        return self.decoder(x_TD, position_T, cursor=cursor, lora=lora)

    def logits(self, hidden_TD: jax.Array) -> jax.Array:
        """Returns `[T, V]` float32 logits of hidden states, by the base model's head."""
        kernel_DV = self.decoder.head.kernel[...]
        hidden_TD = hidden_TD.astype(kernel_DV.dtype)
        return jnp.dot(hidden_TD, kernel_DV, preferred_element_type=jnp.float32)
