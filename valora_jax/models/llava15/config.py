"""The shape of a LLaVA-1.5 model, read from a Hugging Face `config.json`.

A hub config leaves out what equals the defaults of transformers (5.17), so those are filled in
here. A config that is malformed or contradicts itself raises `CheckpointError`; one that asks for
something legal that this port does not do raises `NotImplementedError`. Both list every fault.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from valora_jax.errors import CheckpointError
from valora_jax.models.hf_fields import HfFields

Activation = Literal["quick_gelu", "gelu"]
Dtype = Literal["float32", "float16", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The CLIP tower; `patch_size` and `image_size` are the sides of squares, in pixels."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_size: int
    image_size: int
    activation: Activation = "quick_gelu"
    norm_eps: float = 1e-5

    @property
    def patches(self) -> int:
        """Patches of one image; the class token is not among them."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """The Llama decoder; `tied` means that the head has no weights but the embedding's."""

    vocab_rows: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Llava15Config:
    """A whole model.

    Attributes:
      vision: the image tower.
      decoder: the language model.
      image_token_id: the id whose embeddings are replaced by image features.
      feature_layer: which of the tower's `layers + 1` hidden states feeds the projector; 0 is the
        input of the first block, negative counts from the end.
      keep_class_token: whether the class token's feature stays as an image token of its own.
      dtype: what the weights are stored in; None if the config does not say.
    """

    vision: VisionConfig
    decoder: DecoderConfig
    image_token_id: int = 32000
    feature_layer: int = -2
    keep_class_token: bool = False
    dtype: Dtype | None = None

    @property
    def vision_blocks_used(self) -> int:
        """How many blocks of the tower run; the later ones are stored but feed nothing."""
        return self.feature_layer % (self.vision.layers + 1)

    @property
    def tokens_per_image(self) -> int:
        """Decoder positions that one image takes."""
        return self.vision.patches + self.keep_class_token

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Llava15Config":
        """Reads a parsed `config.json` of transformers 4 or 5, complete or partial.

        Raises:
          CheckpointError: values are malformed or contradict each other.
          NotImplementedError: values are legal, but not ported.
        """
        if (model_type := hf.get("model_type")) != "llava":
            raise CheckpointError([f"config.json: model_type={model_type!r}, want 'llava'"])
        fields = HfFields(hf)
        text = fields.section("text_config", {})
        # Absent as a whole it is CLIP-L/336; a partial one is completed from CLIPVisionConfig.
        vision = _vision(fields.section("vision_config", _CLIP_L_336))
        strategy = fields.one_of(
            "vision_feature_select_strategy", ("default", "full"), default="default"
        )
        config = cls(
            vision=vision,
            # Either place counts: transformers 4 wrote it into text_config only.
            decoder=_decoder(text, tied=fields.flag("tie_word_embeddings", False)),
            image_token_id=fields.whole(
                "image_token_index", fields.whole("image_token_id", 32000, least=0), least=0
            ),
            feature_layer=_feature_layer(fields, vision.layers),
            keep_class_token=strategy == "full",
            dtype=_dtype(fields),
        )
        fields.one_of("projector_hidden_act", ("gelu",), default="gelu")
        fields.one_of("multimodal_projector_bias", (True,), default=True)
        fields.raise_faults()
        return config


_CLIP_L_336 = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 14,
    "image_size": 336,
}


def _vision(fields: HfFields) -> VisionConfig:
    """Reads `vision_config` with CLIPVisionConfig's defaults."""
    fields.one_of("model_type", ("clip_vision_model",), default="clip_vision_model")
    fields.one_of("num_channels", (3,), default=3)
    activations: tuple[Activation, ...] = ("quick_gelu", "gelu")
    vision = VisionConfig(
        width=fields.whole("hidden_size", 768),
        layers=fields.whole("num_hidden_layers", 12),
        heads=fields.whole("num_attention_heads", 12),
        mlp_width=fields.whole("intermediate_size", 3072),
        patch_size=fields.whole("patch_size", 32),
        image_size=fields.whole("image_size", 224),
        activation=fields.one_of("hidden_act", activations, default="quick_gelu"),
        norm_eps=fields.positive("layer_norm_eps", 1e-5),
    )
    if vision.width % vision.heads:
        fields.malformed(f"hidden_size={vision.width} is not a multiple of {vision.heads} heads")
    if vision.image_size % vision.patch_size:
        fields.unported(f"image_size={vision.image_size} not in {vision.patch_size}-pixel patches")
    return vision


def _decoder(fields: HfFields, *, tied: bool) -> DecoderConfig:
    """Reads `text_config` with LlamaConfig's defaults."""
    fields.one_of("model_type", ("llama",), default="llama")
    fields.one_of("hidden_act", ("silu",), default="silu")
    fields.one_of("attention_bias", (False,), default=False)
    fields.one_of("mlp_bias", (False,), default=False)
    width, heads = fields.whole("hidden_size", 4096), fields.whole("num_attention_heads", 32)
    decoder = DecoderConfig(
        vocab_rows=fields.whole("vocab_size", 32000),
        width=width,
        layers=fields.whole("num_hidden_layers", 32),
        heads=heads,
        kv_heads=fields.whole("num_key_value_heads", heads),
        head_width=fields.whole("head_dim", max(width // heads, 1)),
        mlp_width=fields.whole("intermediate_size", 11008),
        norm_eps=fields.positive("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(fields),
        max_positions=fields.whole("max_position_embeddings", 2048),
        tied=fields.flag("tie_word_embeddings", False) or tied,
    )
    if heads % decoder.kv_heads:
        fields.malformed(
            f"num_attention_heads={heads} is not a multiple of {decoder.kv_heads} key-value heads"
        )
    if decoder.head_width % 2:
        fields.malformed(f"head_dim={decoder.head_width} is odd, rotary positions need pairs")
    return decoder


def _rope_theta(fields: HfFields) -> float:
    """The rotary base of both dialects; transformers 5 lets `rope_scaling` win over the new key."""
    theta = fields.positive("rope_theta", 10000.0)
    for key in ("rope_parameters", "rope_scaling"):
        rope = fields.section(key, {})
        for name in ("rope_type", "type"):
            rope.one_of(name, ("default",), default="default")
        rope.one_of("partial_rotary_factor", (1.0,), default=1.0)
        theta = rope.positive("rope_theta", theta)
    fields.one_of("partial_rotary_factor", (1.0,), default=1.0)
    return theta


def _feature_layer(fields: HfFields, layers: int) -> int:
    """`vision_feature_layer`; transformers also takes a list, whose features it concatenates."""
    states = range(-(layers + 1), layers + 1)
    return fields.one_of("vision_feature_layer", states, default=-2)


def _dtype(fields: HfFields) -> Dtype | None:
    """The stored dtype under its new name or its old one."""
    known: tuple[Dtype | None, ...] = ("float32", "float16", "bfloat16", None)
    return fields.one_of("dtype", known, default=fields.one_of("torch_dtype", known, default=None))


_CLIP = VisionConfig(width=1024, layers=24, heads=16, mlp_width=4096, patch_size=14, image_size=336)

LLAVA_1_5_7B = Llava15Config(
    vision=_CLIP,
    decoder=DecoderConfig(
        vocab_rows=32064,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        head_width=128,
        mlp_width=11008,
        norm_eps=1e-5,
        rope_theta=10000.0,
        max_positions=4096,
    ),
    dtype="float16",
)

LLAVA_1_5_13B = dataclasses.replace(
    LLAVA_1_5_7B,
    decoder=dataclasses.replace(
        LLAVA_1_5_7B.decoder, width=5120, layers=40, heads=40, kv_heads=40, mlp_width=13824
    ),
)
