"""Which adapter each row of a step brings: the pytree that every linear receives.

T rows, E output width of all parts of a linear.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lora_matmul import (
    MAX_RANK,
    PAGE_RANKS,
    Counters,
    Implementation,
    LoraPool,
    Part,
    RowTiles,
    Segments,
    block_rows,
    lora_linear,
    lora_matmul,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraBatch:
    """An argument of the step, never a global: no adapter change recompiles anything.

    Attributes:
      pools: site name -> the device's rank pages of that kind of linear.
      biases_LSE: site name -> `[layers, slots, E]` float32, added to rows of the slot; only sites
        whose adapters may bring a bias are in it.
      adapter_T: `[T]` int32 adapter slot of each row, -1 for the base model.
      tiles: the rows cut into tiles of one adapter each.
      counters: of the launches; None where the implementation has none.
      implementation: which kernel multiplies.
      segments: how many adapters the rows bring, where that is known when a step is compiled; the
        kernel's tile is chosen by it, and none is wrong.
    """

    pools: Mapping[str, LoraPool]
    biases_LSE: Mapping[str, jax.Array]
    adapter_T: jax.Array
    tiles: RowTiles
    counters: Counters | None
    implementation: Implementation = dataclasses.field(metadata={"static": True})
    segments: Segments = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        adapter_T: jax.Array,
        *,
        pools: Mapping[str, LoraPool],
        biases_LSE: Mapping[str, jax.Array],
        implementation: Implementation,
        merged: jax.Array | int = -1,
        segments: Segments = "any",
    ) -> "LoraBatch":
        """Cuts the rows into tiles; neighbours with the same adapter share one.

        `merged` is the slot of the adapter that is folded into the weights, or -1: its own rows add
        nothing, all others subtract it.
        """
        height = block_rows(adapter_T.shape[0], implementation=implementation, segments=segments)
        return cls(
            pools=pools,
            biases_LSE=biases_LSE,
            adapter_T=adapter_T,
            tiles=RowTiles.of(adapter_T, merged=merged, block_rows=height),
            counters=Counters.new() if implementation == "triton" else None,
            implementation=implementation,
            segments=segments,
        )

    def at_rows(self, adapter_T: jax.Array) -> "LoraBatch":
        """The same adapters for other rows, such as those of fewer tokens."""
        return LoraBatch.of(
            adapter_T,
            pools=self.pools,
            biases_LSE=self.biases_LSE,
            implementation=self.implementation,
            segments=self.segments,
        )

    def add(
        self,
        y_TE: jax.Array,
        x_TD: jax.Array,
        *,
        sites: Sequence[str],
        columns: Sequence[int],
        layer: int,
    ) -> jax.Array:
        """Adds each row's updates to the base products `y_TE` of linears that share an input.

        Args:
          y_TE: `[T, E]`, the linears side by side.
          x_TD: `[T, D]` their input.
          sites: name of each linear; those without a pool serve no adapter.
          columns: where each begins in `y_TE`.
          layer: of the linears.
        """
        first_of = self._served(sites, columns)
        y_TE = lora_matmul(y_TE, x_TD, self._parts(first_of), **self._how(first_of, layer))
        return self._add_biases(y_TE, first_of, layer=layer)

    def linear(
        self,
        x_TD: jax.Array,
        w_DE: jax.Array,
        *,
        bias_E: jax.Array | None,
        sites: Sequence[str],
        columns: Sequence[int],
        layer: int,
    ) -> jax.Array:
        """Returns the base products of linears that share an input, with each row's updates.

        Args:
          x_TD: `[T, D]` the input.
          w_DE: `[D, E]` the linears side by side.
          bias_E: `[E]` of the base, or None.
          sites, columns, layer: as in `add`.
        """
        first_of = self._served(sites, columns)
        y_TE = lora_linear(
            x_TD,
            w_DE,
            self._parts(first_of),
            bias_E=bias_E,
            counters=self.counters,
            **self._how(first_of, layer),
        )
        return self._add_biases(y_TE, first_of, layer=layer)

    def _served(self, sites: Sequence[str], columns: Sequence[int]) -> dict[str, int]:
        return {s: c for s, c in zip(sites, columns, strict=True) if s in self.pools}

    def _parts(self, first_of: Mapping[str, int]) -> list[Part]:
        return [Part(pool=self.pools[site], column=column) for site, column in first_of.items()]

    def _how(self, sites: Iterable[str], layer: int) -> dict[str, Any]:
        return dict(
            tiles=self.tiles,
            layer=layer,
            implementation=self._implementation(sites),
            segments=self.segments,
        )

    def _add_biases(self, y_TE: jax.Array, first_of: Mapping[str, int], *, layer: int) -> jax.Array:
        for site in first_of.keys() & self.biases_LSE.keys():
            bias_TE = self.biases_LSE[site][layer, self.adapter_T]  # -1 reads another, is masked
            bias_TE = jnp.where(self.adapter_T[:, None] >= 0, bias_TE, 0).astype(y_TE.dtype)
            first, last = first_of[site], first_of[site] + bias_TE.shape[1]
            y_TE = y_TE.at[:, first:last].add(bias_TE)
        return y_TE

    def _implementation(self, sites: Iterable[str]) -> Implementation:
        """Whole replacements of linears have ranks that only one implementation takes."""
        widest = max((self.pools[site].page_SW.shape[1] for site in sites), default=0)
        return "xla" if widest * PAGE_RANKS > MAX_RANK else self.implementation
