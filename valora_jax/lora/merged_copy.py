"""A second copy of a model's linears with one adapter folded in, filled a layer at a time.

Always computed from the base weights, in float32 with one rounding: the copy of an adapter is the
same bit for bit whatever was in it before. Its memory is taken once.
"""

import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lora_matmul import Implementation, LoraPool, Part
from pallas_kernels.lora_merge import fastest, lora_merge

type Leaves = list[jax.Array]

_MEASURED_FILLS = 3


class MergedLinear(NamedTuple):
    """A linear, or several that share an input, in the list of a model's weights.

    Attributes:
      leaf: place of its kernel `[D, E]` in the list.
      sites: LoRA site of each part.
      columns: where each part begins in E.
      layer: of the linear.
    """

    leaf: int
    sites: tuple[str, ...]
    columns: tuple[int, ...]
    layer: int


class MergedCopy:
    """Weights with an adapter in them. Nothing but `measure_ms` waits for the device.

    Attributes:
      layers: how many there are to fill.
    """

    def __init__(
        self,
        base: Mapping[np.dtype, Leaves],
        linears: Sequence[MergedLinear],
        *,
        implementation: Implementation,
    ):
        """Takes the memory.

        Args:
          base: the model's flat weights in each dtype that steps run in; all of them get a copy.
          linears: what of them adapters are folded into; the rest is shared with the base.
          implementation: of the steps' LoRA. With "xla" merges are plain XLA, too; else each linear
            is merged by what is fastest there.
        """
        ordered = sorted(linears, key=lambda linear: linear.layer)
        groups = itertools.groupby(ordered, key=lambda linear: linear.layer)
        self._groups = [(layer, tuple(group)) for layer, group in groups]
        self._base, self._implementation = base, implementation
        self._leaves = {dtype: list(leaves) for dtype, leaves in base.items()}
        for leaves in self._leaves.values():
            for linear in linears:
                leaves[linear.leaf] = jnp.zeros_like(leaves[linear.leaf])

    @property
    def layers(self) -> int:
        return len(self._groups)

    def leaves(self, dtype: np.dtype) -> Leaves:
        """The weights for steps of a dtype, as they are now; take them anew for every step."""
        return self._leaves[dtype]

    def measure_ms(self, pools: Mapping[str, LoraPool]) -> float:
        """Compiles what fills the copy, then fills all of it from slot 0, and waits for it.

        Only for a copy that nobody uses.

        Returns:
          Milliseconds of the quickest of a few times: what keeps the host from enqueueing is not
          the merge's.
        """
        self.fill(0, pools, slot=0)
        jax.block_until_ready(self._leaves)
        return min(self._fill_ms(pools) for _ in range(_MEASURED_FILLS))

    def _fill_ms(self, pools: Mapping[str, LoraPool]) -> float:
        start_s = time.perf_counter()
        for nth in range(self.layers):
            self.fill(nth, pools, slot=0)
        jax.block_until_ready(self._leaves)
        return 1e3 * (time.perf_counter() - start_s)

    def fill(self, nth: int, pools: Mapping[str, LoraPool], *, slot: int) -> None:
        """Enqueues the nth layer: base weights plus the update of the adapter in a slot.

        Args:
          nth: in `[0, layers)`.
          pools: site -> the device's rank pages, those of sites that serve adapters.
          slot: whose pages; an empty one makes the copy of the base.
        """
        layer, group = self._groups[nth]
        served = [
            {s: c for s, c in zip(linear.sites, linear.columns, strict=True) if s in pools}
            for linear in group
        ]
        for dtype, leaves in self._leaves.items():
            merged = _merge(
                tuple(leaves[linear.leaf] for linear in group),
                tuple(self._base[dtype][linear.leaf] for linear in group),
                tuple(tuple(pools[site] for site in columns) for columns in served),
                np.int32(layer),
                np.int32(slot),
                columns=tuple(tuple(columns.values()) for columns in served),
                implementation=self._implementation,
            )
            for linear, kernel_DE in zip(group, merged, strict=True):
                leaves[linear.leaf] = kernel_DE


def copy_bytes(base: Mapping[np.dtype, Leaves], linears: Sequence[MergedLinear]) -> int:
    """What a `MergedCopy` of these takes on the device."""
    return sum(leaves[linear.leaf].nbytes for leaves in base.values() for linear in linears)


# One call a layer, compiled once for all of them: `merged` is only written, its memory is reused.
@functools.partial(
    jax.jit, static_argnames=("columns", "implementation"), donate_argnums=0, keep_unused=True
)
def _merge(merged, base, pools, layer, slot, *, columns, implementation):
    copies = []
    for copy_DE, base_DE, own, first in zip(merged, base, pools, columns, strict=True):
        parts = [Part(pool=pool, column=c) for pool, c in zip(own, first, strict=True)]
        merges_by = "xla" if implementation == "xla" else fastest(base_DE, parts)
        at = dict(layer=layer, slot=slot)
        copies.append(lora_merge(copy_DE, base_DE, parts, **at, implementation=merges_by))
    return tuple(copies)
