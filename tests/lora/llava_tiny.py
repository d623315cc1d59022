"""The linears of the tiny LLaVA-1.5 that the golden adapters were trained on."""

import pathlib

from valora_jax.lora.adapter import AdapterTarget, LoraSite

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens" / "adapters"

LM, TOWER, PROJECTOR = (
    "model.language_model.layers.{i}.",
    "model.vision_tower.encoder.layers.{i}.",
    "model.multi_modal_projector.",
)
# (name, module, layers, input width, output width)
SITES = [
    *((f"decoder.{n}", f"{LM}self_attn.{n}_proj", 4, 128, 128) for n in "qkvo"),
    *((f"decoder.{n}", f"{LM}mlp.{n}_proj", 4, 128, 192) for n in ("gate", "up")),
    ("decoder.down", f"{LM}mlp.down_proj", 4, 192, 128),
    *((f"vision.{n}", f"{TOWER}self_attn.{n}_proj", 4, 64, 64) for n in ("q", "k", "v", "out")),
    ("vision.fc1", f"{TOWER}mlp.fc1", 4, 64, 160),
    ("vision.fc2", f"{TOWER}mlp.fc2", 4, 160, 64),
    ("projector.linear_1", f"{PROJECTOR}linear_1", 1, 64, 128),
    ("projector.linear_2", f"{PROJECTOR}linear_2", 1, 128, 128),
    ("head", "lm_head", 1, 128, 704),
]


def canonical(name: str) -> str:
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head", "lm_head"),
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("model.vision_tower.vision_model.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


TARGET = AdapterTarget(
    sites=[
        LoraSite(name=name, module=module, layers=layers, in_width=K, out_width=N)
        for name, module, layers, K, N in SITES
    ],
    head_module="lm_head",
    width=128,
    vocab_rows=704,
    canonical_name=canonical,
)
