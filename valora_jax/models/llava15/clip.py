"""CLIP's vision tower, as far as LLaVA uses it, and the projector into the decoder.

Ported from `transformers.models.clip` and `.llava` (5.17: `CLIPVisionTransformer`,
`LlavaMultiModalProjector`). I images, X patches, S = X + 1 tokens with the class token first,
D vision width, E decoder width, N heads, H head width, p patch side.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from valora_jax.layers.linear import Linear
from valora_jax.layers.norm import LayerNorm
from valora_jax.lora.batch import LoraBatch
from valora_jax.models.llava15.config import Activation, Llava15Config, VisionConfig


def _activate(x: jax.Array, activation: Activation) -> jax.Array:
    """In float32, rounded once: a CPU takes twice as long to round after every operation."""
    wide = x.astype(jnp.float32)
    if activation == "quick_gelu":
        wide *= jax.nn.sigmoid(1.702 * wide)
    else:
        # Hugging Face's "gelu" is the exact erf form; jax.nn.gelu defaults to the tanh one.
        wide = jax.nn.gelu(wide, approximate=False)
    return wide.astype(x.dtype)


class VisionAttention(nnx.Module):
    """Full attention among the tokens of each image."""

    def __init__(self, cfg: VisionConfig, *, layer: int, dtype: DTypeLike, rngs: nnx.Rngs):
        D, self.heads = cfg.width, cfg.heads
        linear = functools.partial(Linear, layer=layer, bias=True, dtype=dtype, rngs=rngs)
        self.qkv = linear(D, (D, D, D), sites=("vision.q", "vision.k", "vision.v"))
        self.out = linear(D, (D,), sites=("vision.o",))

    def __call__(self, x_TD: jax.Array, *, images: int, lora: LoraBatch | None) -> jax.Array:
        D = x_TD.shape[-1]
        shape = (images, -1, self.heads, D // self.heads)
        q_ISNH, k_ISNH, v_ISNH = (part.reshape(shape) for part in self.qkv(x_TD, lora))
        out_ISNH = jax.nn.dot_product_attention(q_ISNH, k_ISNH, v_ISNH)
        (out_TD,) = self.out(out_ISNH.reshape(-1, D), lora)
        return out_TD


class VisionMlp(nnx.Module):
    """Two linears with the tower's activation between."""

    def __init__(self, cfg: VisionConfig, *, layer: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.activation: Activation = cfg.activation
        D, F = cfg.width, cfg.mlp_width
        linear = functools.partial(Linear, layer=layer, bias=True, dtype=dtype, rngs=rngs)
        self.up = linear(D, (F,), sites=("vision.up",))
        self.down = linear(F, (D,), sites=("vision.down",))

    def __call__(self, x_TD: jax.Array, *, lora: LoraBatch | None) -> jax.Array:
        (hidden_TF,) = self.up(x_TD, lora)
        (out_TD,) = self.down(_activate(hidden_TF, self.activation), lora)
        return out_TD


class VisionBlock(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, cfg: VisionConfig, *, layer: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(cfg.width, eps=cfg.norm_eps, dtype=dtype)
        self.attention = VisionAttention(cfg, layer=layer, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(cfg.width, eps=cfg.norm_eps, dtype=dtype)
        self.mlp = VisionMlp(cfg, layer=layer, dtype=dtype, rngs=rngs)

    def __call__(self, x_TD: jax.Array, *, images: int, lora: LoraBatch | None) -> jax.Array:
        x_TD += self.attention(self.norm1(x_TD), images=images, lora=lora)
        return x_TD + self.mlp(self.norm2(x_TD), lora=lora)


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its kernel: one matmul over flattened patches."""

    def __init__(self, cfg: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.patch_size = cfg.patch_size
        shape = (3 * cfg.patch_size**2, cfg.width)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * shape[0] ** -0.5)

    def __call__(self, pixels_I3hw: jax.Array) -> jax.Array:
        (I, _, height, width), p = pixels_I3hw.shape, self.patch_size
        patches = pixels_I3hw.reshape(I, 3, height // p, p, width // p, p)
        patches_IXp = patches.transpose(0, 2, 4, 1, 3, 5).reshape(I, -1, 3 * p * p)
        return jnp.dot(
            patches_IXp.astype(self.kernel.dtype),
            self.kernel[...],
            preferred_element_type=jnp.float32,
        ).astype(self.kernel.dtype)


class VisionTower(nnx.Module):
    """The tower up to the feature layer. Blocks past it feed nothing; they are kept because a
    checkpoint holds them, so that conversion gives every tensor back."""

    def __init__(self, cfg: Llava15Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        vision, D = cfg.vision, cfg.vision.width
        self.blocks_used, self.keep_class_token = cfg.vision_blocks_used, cfg.keep_class_token
        self.patch_embedding = PatchEmbedding(vision, dtype=dtype, rngs=rngs)
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (D,), dtype))
        shape_SD = (1 + vision.patches, D)
        self.position_embedding = nnx.Param(jax.random.normal(rngs.params(), shape_SD, dtype))
        self.pre_norm = LayerNorm(D, eps=vision.norm_eps, dtype=dtype)
        self.layers = nnx.List(
            VisionBlock(vision, layer=i, dtype=dtype, rngs=rngs) for i in range(vision.layers)
        )
        self.post_norm = LayerNorm(D, eps=vision.norm_eps, dtype=dtype)

    def __call__(self, pixels_I3hw: jax.Array, *, lora: LoraBatch | None) -> jax.Array:
        """Returns `[I, tokens_per_image, D]`; `lora` has a row for each of the I * S tokens."""
        images, D = pixels_I3hw.shape[0], self.class_embedding.shape[0]
        patches_IXD = self.patch_embedding(pixels_I3hw)
        class_I1D = jnp.broadcast_to(self.class_embedding[...], (images, 1, D))
        x_ISD = jnp.concatenate([class_I1D, patches_IXD], axis=1) + self.position_embedding[...]
        # Vectors may be wider than the matrices, whose dtype is that of the arithmetic.
        x_TD = self.pre_norm(x_ISD).reshape(-1, D).astype(patches_IXD.dtype)
        for block in self.layers[: self.blocks_used]:
            x_TD = block(x_TD, images=images, lora=lora)
        x_ISD = x_TD.reshape(x_ISD.shape)
        return x_ISD if self.keep_class_token else x_ISD[:, 1:]


class Projector(nnx.Module):
    """Two linears with a GELU between: vision features become decoder embeddings."""

    def __init__(self, cfg: Llava15Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        D, E = cfg.vision.width, cfg.decoder.width
        linear = functools.partial(Linear, bias=True, dtype=dtype, rngs=rngs)
        self.up = linear(D, (E,), sites=("projector.up",))
        self.down = linear(E, (E,), sites=("projector.down",))

    def __call__(self, x_TD: jax.Array, *, lora: LoraBatch | None) -> jax.Array:
        (hidden_TE,) = self.up(x_TD, lora)
        (out_TE,) = self.down(_activate(hidden_TE, "gelu"), lora)
        return out_TE
