"""Linears and attention of the models that are served, by name: what is tuned and timed."""

import dataclasses
from typing import NamedTuple


class LinearShape(NamedTuple):
    """One product of linears that share an input: its width, and theirs side by side."""

    width: int
    columns: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A decoder; `mlp_width` is that of each of gate and up."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int

    @property
    def linears(self) -> dict[str, LinearShape]:
        """The four products of a layer."""
        q, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        return {
            "qkv": LinearShape(self.width, (q, kv, kv)),
            "o": LinearShape(q, (self.width,)),
            "gate_up": LinearShape(self.width, (self.mlp_width, self.mlp_width)),
            "down": LinearShape(self.mlp_width, (self.width,)),
        }


def _shape(layers: int, width: int, heads: int, kv_heads: int, mlp_width: int) -> ModelShape:
    return ModelShape(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_width=128,
        mlp_width=mlp_width,
    )


MODELS = {
    "llava-1.5-7b": _shape(32, 4096, 32, 32, 11008),
    "llava-1.5-13b": _shape(40, 5120, 40, 40, 13824),
    "qwen-vl-7b": _shape(32, 4096, 32, 32, 11008),
    "qwen2.5-vl-7b": _shape(28, 3584, 28, 4, 18944),
}
