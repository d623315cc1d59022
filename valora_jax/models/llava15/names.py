"""Tensor names of LLaVA-1.5: four ways to write the same parameter, one canonical.

Canonical is what transformers 5 has in memory, and so what PEFT adapters name:
`model.language_model.layers.0…`, `lm_head`, `model.multi_modal_projector…`, `model.vision_tower…`.
A file may hold any of `LAYOUTS`; PEFT's key paths follow the same four.
"""

from collections.abc import Iterable
from typing import Literal

Layout = Literal["hub", "saved", "in_memory", "in_memory_4"]

# Layout -> the prefixes of the four parts, in the order of _CANONICAL. "hub" is what llava-hf
# publishes, "saved" what transformers 5 writes, "in_memory_4" the state dict of 4.52 to 4.57.
LAYOUTS: dict[Layout, tuple[str, str, str, str]] = {
    "hub": (
        "language_model.model",
        "language_model.lm_head",
        "multi_modal_projector",
        "vision_tower.vision_model",
    ),
    "saved": (
        "language_model.model",
        "language_model.lm_head",
        "multi_modal_projector",
        "vision_tower",
    ),
    "in_memory": (
        "model.language_model",
        "lm_head",
        "model.multi_modal_projector",
        "model.vision_tower",
    ),
    "in_memory_4": (
        "model.language_model",
        "lm_head",
        "model.multi_modal_projector",
        "model.vision_tower.vision_model",
    ),
}
_CANONICAL = LAYOUTS["in_memory"]

# Buffers that old files hold and nobody needs: they follow from the config.
IGNORED = ("embeddings.position_ids", "rotary_emb.inv_freq")

# Longest first: "vision_tower" is a prefix of "vision_tower.vision_model".
_PREFIXES = sorted(
    {pair for layout in LAYOUTS.values() for pair in zip(layout, _CANONICAL, strict=True)},
    key=lambda pair: -len(pair[0]),
)


def canonical(name: str) -> str:
    """Maps a tensor name or module path of any layout onto the canonical one.

    A name that belongs to no layout is returned as it is, for the caller to report.
    """
    for prefix, ours in _PREFIXES:
        if _starts(name, prefix):
            return ours + name[len(prefix) :]
    return name


def written(name: str, layout: Layout) -> str:
    """The inverse of `canonical`: what a file of `layout` calls the canonical `name`."""
    for ours, prefix in zip(_CANONICAL, LAYOUTS[layout], strict=True):
        if _starts(name, ours):
            return prefix + name[len(ours) :]
    raise ValueError(f"{name!r} is not a canonical name: those start with {', '.join(_CANONICAL)}")


def layout_of(names: Iterable[str]) -> Layout:
    """Tells which layout the `names` of a whole checkpoint are written in.

    Raises:
      ValueError: no layout explains all of them.
    """
    names = list(names)
    for layout in LAYOUTS:
        if all(name == written(canonical(name), layout) for name in names):
            return layout
    raise ValueError(f"{len(names)} tensor names that follow no single layout of {list(LAYOUTS)}")


def _starts(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
