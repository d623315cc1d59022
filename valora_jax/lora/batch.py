"""Which adapter each row of a step brings: the pytree that every linear receives.

T rows, P active pages.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.lora_matmul import ActivePages, Implementation, LoraPool, lora_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraBatch:
    """An argument of the step, never a global: no adapter change recompiles anything.

    Attributes:
      pools: site name -> the device's rank pages of that kind of linear.
      biases_LSE: site name -> `[layers, slots, E]` float32, added to rows of the slot; only sites
        whose adapters may bring a bias are in it.
      active: site name -> the pages that this step uses there.
      adapter_T: `[T]` int32 adapter slot of each row, -1 for the base model.
      implementation: which kernel multiplies.
    """

    pools: Mapping[str, LoraPool]
    biases_LSE: Mapping[str, jax.Array]
    active: Mapping[str, ActivePages]
    adapter_T: jax.Array
    implementation: Implementation = dataclasses.field(metadata={"static": True})

    def at_rows(self, adapter_T: jax.Array) -> "LoraBatch":
        """The same adapters for other rows, such as those that are sampled."""
        return dataclasses.replace(self, adapter_T=adapter_T)

    def add(self, y_TE: jax.Array, x_TD: jax.Array, *, site: str, layer: int) -> jax.Array:
        """Adds each row's update to the base product `y_TE`."""
        y_TE = lora_matmul(
            y_TE,
            x_TD,
            self.pools[site],
            active=self.active[site],
            adapter_T=self.adapter_T,
            layer=layer,
            implementation=self.implementation,
        )
        if (bias_LSE := self.biases_LSE.get(site)) is None:
            return y_TE
        bias_TE = bias_LSE[layer, self.adapter_T]  # -1 reads the last slot, and is masked
        return y_TE + jnp.where(self.adapter_T[:, None] >= 0, bias_TE, 0).astype(y_TE.dtype)
