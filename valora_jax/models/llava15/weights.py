"""The weight map of LLaVA-1.5: every tensor of a checkpoint, its shape, and our parameter.

Canonical names (`names.canonical`) on the left, paths of `modeling.Llava15` on the right. D model
width, F MLP width, N/K query/KV heads, H head width, V vocabulary rows, X patches, p patch side.
"""

import math

from valora_jax.models.llava15.config import DecoderConfig, Llava15Config, VisionConfig
from valora_jax.models.weight_map import Entry, Shape, for_each_layer


def entries(cfg: Llava15Config) -> tuple[Entry, ...]:
    """The whole table of a model of this size."""
    return (*_vision(cfg.vision), *_projector(cfg), *_decoder(cfg.decoder))


def expected_shapes(cfg: Llava15Config) -> dict[str, Shape]:
    """Our path -> the shape of every parameter, copies included."""
    return {entry.ours: entry.shape for entry in entries(cfg)}


def parameter_count(cfg: Llava15Config) -> int:
    """Numbers that a checkpoint of this size stores; a tied head counts once."""
    return sum(math.prod(entry.shape) for entry in entries(cfg) if entry.stand_in is None)


def _vision(cfg: VisionConfig) -> list[Entry]:
    D, F, p = cfg.width, cfg.mlp_width, cfg.patch_size
    tower, embeddings = "model.vision_tower", "model.vision_tower.embeddings"
    hf, ours = f"{tower}.encoder.layers.{{i}}", "vision.layers.{i}"
    qkv = [f"{hf}.self_attn.{name}_proj" for name in "qkv"]
    layer = [
        *_layer_norm(f"{hf}.layer_norm1", f"{ours}.norm1", D),
        _kernel(dict.fromkeys(qkv, (D, D)), f"{ours}.attention.qkv"),
        Entry({f"{name}.bias": (D,) for name in qkv}, f"{ours}.attention.qkv.bias"),
        *_linear(f"{hf}.self_attn.out_proj", f"{ours}.attention.out", (D, D)),
        *_layer_norm(f"{hf}.layer_norm2", f"{ours}.norm2", D),
        *_linear(f"{hf}.mlp.fc1", f"{ours}.mlp.up", (F, D)),
        *_linear(f"{hf}.mlp.fc2", f"{ours}.mlp.down", (D, F)),
    ]
    return [
        Entry({f"{embeddings}.class_embedding": (D,)}, "vision.class_embedding"),
        _kernel({f"{embeddings}.patch_embedding": (D, 3, p, p)}, "vision.patch_embedding"),
        Entry(
            {f"{embeddings}.position_embedding.weight": (1 + cfg.patches, D)},
            "vision.position_embedding",
        ),
        *_layer_norm(f"{tower}.pre_layrnorm", "vision.pre_norm", D),  # the file's own spelling
        *for_each_layer(cfg.layers, layer),
        *_layer_norm(f"{tower}.post_layernorm", "vision.post_norm", D),
    ]


def _projector(cfg: Llava15Config) -> list[Entry]:
    D, hf = cfg.decoder.width, "model.multi_modal_projector"
    return [
        *_linear(f"{hf}.linear_1", "projector.up", (D, cfg.vision.width)),
        *_linear(f"{hf}.linear_2", "projector.down", (D, D)),
    ]


def _decoder(cfg: DecoderConfig) -> list[Entry]:
    D, F, V = cfg.width, cfg.mlp_width, cfg.vocab_rows
    NH, KH = cfg.heads * cfg.head_width, cfg.kv_heads * cfg.head_width
    hf, ours = "model.language_model.layers.{i}", "decoder.layers.{i}"
    attention, mlp = f"{hf}.self_attn", f"{hf}.mlp"
    embedding = "model.language_model.embed_tokens.weight"
    layer = [
        Entry({f"{hf}.input_layernorm.weight": (D,)}, f"{ours}.input_norm.scale"),
        _kernel(
            {
                f"{attention}.q_proj": (NH, D),
                f"{attention}.k_proj": (KH, D),
                f"{attention}.v_proj": (KH, D),
            },
            f"{ours}.attention.qkv",
        ),
        _kernel({f"{attention}.o_proj": (D, NH)}, f"{ours}.attention.out"),
        Entry({f"{hf}.post_attention_layernorm.weight": (D,)}, f"{ours}.post_norm.scale"),
        _kernel({f"{mlp}.gate_proj": (F, D), f"{mlp}.up_proj": (F, D)}, f"{ours}.mlp.gate_up"),
        _kernel({f"{mlp}.down_proj": (D, F)}, f"{ours}.mlp.down"),
    ]
    return [
        Entry({embedding: (V, D)}, "decoder.embedding"),
        *for_each_layer(cfg.layers, layer),
        Entry({"model.language_model.norm.weight": (D,)}, "decoder.norm.scale"),
        Entry(
            {"lm_head.weight": (V, D)},
            "decoder.head.kernel",
            "transposed",
            stand_in=embedding if cfg.tied else None,
        ),
    ]


def _kernel(shapes: dict[str, Shape], ours: str) -> Entry:
    """The weight of a torch Linear, `[out, in]`, or of several that share their input."""
    return Entry(
        {f"{module}.weight": shape for module, shape in shapes.items()},
        f"{ours}.kernel",
        "transposed",
    )


def _linear(hf: str, ours: str, shape: Shape) -> list[Entry]:
    """A torch Linear with bias."""
    return [_kernel({hf: shape}, ours), Entry({f"{hf}.bias": shape[:1]}, f"{ours}.bias")]


def _layer_norm(hf: str, ours: str, width: int) -> list[Entry]:
    return [
        Entry({f"{hf}.weight": (width,)}, f"{ours}.scale"),
        Entry({f"{hf}.bias": (width,)}, f"{ours}.bias"),
    ]
