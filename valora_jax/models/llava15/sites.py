"""Where adapters attach to LLaVA-1.5: every linear of the decoder, tower, projector and head."""

from valora_jax.lora.adapter import AdapterTarget, LoraSite
from valora_jax.models.llava15.config import Llava15Config
from valora_jax.models.llava15.names import canonical


def adapter_target(cfg: Llava15Config) -> AdapterTarget:
    """Describes the sites by their canonical module paths (`names.canonical`)."""
    return AdapterTarget(
        sites=(*_decoder(cfg), *_vision(cfg), *_projector_and_head(cfg)),
        head_module="lm_head",
        width=cfg.decoder.width,
        vocab_rows=cfg.decoder.vocab_rows,
        canonical_name=canonical,
    )


def _decoder(cfg: Llava15Config) -> list[LoraSite]:
    decoder = cfg.decoder
    D, F = decoder.width, decoder.mlp_width
    NH, KH = decoder.heads * decoder.head_width, decoder.kv_heads * decoder.head_width
    widths = {
        "self_attn.q_proj": ("q", D, NH),
        "self_attn.k_proj": ("k", D, KH),
        "self_attn.v_proj": ("v", D, KH),
        "self_attn.o_proj": ("o", NH, D),
        "mlp.gate_proj": ("gate", D, F),
        "mlp.up_proj": ("up", D, F),
        "mlp.down_proj": ("down", F, D),
    }
    return _sites("decoder", "model.language_model.layers", decoder.layers, widths)


def _vision(cfg: Llava15Config) -> list[LoraSite]:
    D, F = cfg.vision.width, cfg.vision.mlp_width
    widths = {
        "self_attn.q_proj": ("q", D, D),
        "self_attn.k_proj": ("k", D, D),
        "self_attn.v_proj": ("v", D, D),
        "self_attn.out_proj": ("o", D, D),
        "mlp.fc1": ("up", D, F),
        "mlp.fc2": ("down", F, D),
    }
    return _sites("vision", "model.vision_tower.encoder.layers", cfg.vision.layers, widths)


def _projector_and_head(cfg: Llava15Config) -> list[LoraSite]:
    D, E = cfg.vision.width, cfg.decoder.width
    single = {
        "projector.up": ("model.multi_modal_projector.linear_1", D, E),
        "projector.down": ("model.multi_modal_projector.linear_2", E, E),
        "head": ("lm_head", E, cfg.decoder.vocab_rows),
    }
    return [
        LoraSite(name=name, module=module, layers=1, in_width=inside, out_width=outside)
        for name, (module, inside, outside) in single.items()
    ]


def _sites(
    part: str, prefix: str, layers: int, widths: dict[str, tuple[str, int, int]]
) -> list[LoraSite]:
    return [
        LoraSite(
            name=f"{part}.{kind}",
            module=f"{prefix}.{{i}}.{module}",
            layers=layers,
            in_width=inside,
            out_width=outside,
        )
        for module, (kind, inside, outside) in widths.items()
    ]
