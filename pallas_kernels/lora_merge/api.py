"""Merging: writes base weights plus one adapter's update into a second copy of the weights.

    merged_DE = base_DE, and in the columns of each part
                + scale_LS[layer, slot] * sum over pages p of the slot: A_p^T @ B_p

Summed in float32 and rounded once, always from the pristine base: nothing drifts however often the
adapter changes, and going from one adapter to another is one pass.

D input width, E output width of all parts, L layers, S adapter slots.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import numpy as np

from pallas_kernels.lora_matmul.api import Part
from pallas_kernels.lora_matmul.layout import LoraPool
from pallas_kernels.lora_merge import mosaic, triton, xla
from pallas_kernels.lora_merge.tiles import MergeTile

Implementation = Literal["mosaic", "triton", "xla"]

_HOPPER = "9.0"  # whose instructions "mosaic" is made of


def fastest(base_DE: jax.Array, parts: Sequence[Part]) -> Implementation:
    """Which implementation merges these fastest on the device that jax uses by default."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is None:
        return "xla"
    refused = capability != _HOPPER or mosaic.refusal(base_DE, *_operands(parts))
    return "triton" if refused else "mosaic"


def lora_merge(
    merged_DE: jax.Array,
    base_DE: jax.Array,
    parts: Sequence[Part],
    *,
    layer: int | jax.Array,
    slot: int | jax.Array,
    implementation: Implementation,
    tile: MergeTile | None = None,
) -> jax.Array:
    """Fills the merged copy of one layer's linear, or of linears that share an input.

    Args:
      merged_DE: `[D, E]` the copy to fill. Donated: its memory is the result's, its values do not
        matter, and it must not be used again.
      base_DE: `[D, E]` base weights of the parts side by side, same dtype.
      parts: pools and first columns, in ascending order. Columns of no part, and those of parts
        of which the slot has no pages, are copied.
      layer: which layer's rows of each page to use, in `[0, layers)`. Values on the device, of this
        and of `slot`, are not checked.
      slot: whose adapter to fold in, in `[0, slots)`.
      implementation: "mosaic" for Hopper GPUs, "triton" for NVIDIA GPUs, "xla" anywhere; see
        `fastest`.
      tile: shape of the "triton" kernel's blocks; `default_tile` if None.

    Returns:
      `[D, E]` in the dtype of the base. `layer` and `slot` are run-time operands: one compilation
      serves all layers of a shape.

    Raises:
      ValueError: the shapes contradict each other.
      NotImplementedError: weights or pools are not bfloat16, float16 or float32, or "mosaic" lacks
        something for these: another dtype than one of 16 bits, rows or columns of a part that 64
        does not divide, no parts.
    """
    if merged_DE.shape != base_DE.shape or merged_DE.dtype != base_DE.dtype:
        raise ValueError(
            f"the copy is {merged_DE.dtype}{list(merged_DE.shape)}, "
            f"the base {base_DE.dtype}{list(base_DE.shape)}"
        )
    _check_parts(base_DE.shape, parts, layer=layer, slot=slot)
    for array in (base_DE, *(rows for p in parts for rows in (p.pool.a_RD, p.pool.b_RE))):
        if array.dtype not in ("bfloat16", "float16", "float32"):
            raise NotImplementedError(
                f"{array.dtype} is not merged; convert to bfloat16, float16 or float32"
            )
    pools, columns = _operands(parts)
    at = (x if isinstance(x, jax.Array) else np.int32(x) for x in (layer, slot))
    args = (merged_DE, base_DE, pools, *at)
    match implementation:
        case "xla":
            return xla.lora_merge(*args, columns=columns)
        case "mosaic":
            return mosaic.lora_merge(*args, columns=columns)
        case "triton":
            return triton.lora_merge(*args, columns=columns, tile=tile)
    known = ", ".join(map(repr, get_args(Implementation)))
    raise ValueError(f"unknown implementation {implementation!r}; known: {known}")


def _operands(parts: Sequence[Part]) -> tuple[tuple[LoraPool, ...], tuple[int, ...]]:
    return tuple(part.pool for part in parts), tuple(part.column for part in parts)


def _check_parts(
    shape: tuple[int, ...],
    parts: Sequence[Part],
    *,
    layer: int | jax.Array,
    slot: int | jax.Array,
) -> None:
    (D, E), free = shape, 0
    for part in parts:
        (layers, slots), width = part.pool.scale_LS.shape, part.pool.a_RD.shape[1]
        if width != D:
            raise ValueError(f"pool is for inputs of width {width}, base_DE has {D}")
        if not isinstance(layer, jax.Array) and not 0 <= layer < layers:
            raise ValueError(f"layer={layer} is not in [0, {layers})")
        if not isinstance(slot, jax.Array) and not 0 <= slot < slots:
            raise ValueError(f"slot={slot} is not in [0, {slots})")
        stop = part.column + part.pool.b_RE.shape[1]
        if not free <= part.column <= stop <= E:
            raise ValueError(
                f"columns {part.column}:{stop} of a part are not within {free}:{E}, "
                "which the parts before it leave"
            )
        free = stop
