"""Which adapter each row of a step brings: the pytree that every linear receives.

T rows, F first rows, E output width.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.lora_matmul import ActivePages, Implementation, LoraPool, lora_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FirstRows:
    """Rows at the front with many adapters and few rows each, multiplied apart from the rest.

    Attributes:
      active: site name -> the pages that these rows use there.
      adapter_F: `[F]` int32 adapter slot of each, -1 for none.
    """

    active: Mapping[str, ActivePages]
    adapter_F: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraBatch:
    """An argument of the step, never a global: no adapter change recompiles anything.

    Attributes:
      pools: site name -> the device's rank pages of that kind of linear.
      biases_LSE: site name -> `[layers, slots, E]` float32, added to rows of the slot; only sites
        whose adapters may bring a bias are in it.
      active: site name -> the pages that the rows of `adapter_T` use there.
      adapter_T: `[T]` int32 adapter slot of each row, -1 for the base model.
      first: rows at the front that bring their adapters in here, and -1 in `adapter_T`. In a step
        that mixes decodes and prompts, a page of a decode is then not multiplied with a whole
        prompt's rows.
      implementation: which kernel multiplies.
    """

    pools: Mapping[str, LoraPool]
    biases_LSE: Mapping[str, jax.Array]
    active: Mapping[str, ActivePages]
    adapter_T: jax.Array
    first: FirstRows | None = None
    implementation: Implementation = dataclasses.field(metadata={"static": True})

    def at_rows(self, adapter_T: jax.Array) -> "LoraBatch":
        """The same pages for other rows, such as those of fewer tokens."""
        return dataclasses.replace(self, adapter_T=adapter_T, first=None)

    def add(self, y_TE: jax.Array, x_TD: jax.Array, *, site: str, layer: int) -> jax.Array:
        """Adds each row's update to the base product `y_TE`."""
        y_TE = self._add(y_TE, x_TD, self.active, self.adapter_T, site=site, layer=layer)
        if self.first is None:
            return y_TE
        F = self.first.adapter_F.shape[0]
        active, adapter_F = self.first.active, self.first.adapter_F
        y_FE = self._add(y_TE[:F], x_TD[:F], active, adapter_F, site=site, layer=layer)
        return y_TE.at[:F].set(y_FE)

    def _add(self, y_TE, x_TD, active, adapter_T, *, site: str, layer: int) -> jax.Array:
        y_TE = lora_matmul(
            y_TE,
            x_TD,
            self.pools[site],
            active=active[site],
            adapter_T=adapter_T,
            layer=layer,
            implementation=self.implementation,
        )
        if (bias_LSE := self.biases_LSE.get(site)) is None:
            return y_TE
        bias_TE = bias_LSE[layer, adapter_T]  # -1 reads the last slot, and is masked
        return y_TE + jnp.where(adapter_T[:, None] >= 0, bias_TE, 0).astype(y_TE.dtype)
