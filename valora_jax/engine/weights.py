"""The model as steps take it: a module without weights, flat lists of them, and the merged copy."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from pallas_kernels.lora_matmul import Implementation
from valora_jax.engine.precision import Precision, in_dtype
from valora_jax.engine.step import ModelShape
from valora_jax.layers.linear import Linear
from valora_jax.lora.merged_copy import Leaves, MergedCopy, MergedLinear, copy_bytes
from valora_jax.lora.strength import BaseEnergy, base_energy
from valora_jax.models.build import parameter_paths, with_weights
from valora_jax.models.spec import Model, ModelSpec

DECODER = "decoder."  # how the LoRA sites begin that adapters are folded into


class StepWeights:
    """Holds the weights for as long as the engine lives.

    Attributes:
      shape: the module.
      copy: the merged one; None until `take_copy`.
    """

    def __init__(self, model: Model, spec: ModelSpec, precision: Precision):
        """Flattens a model's weights, and casts those that some steps want in another dtype."""
        self.shape, self._base = _split(model, spec, precision)
        self._linears = _merged_linears(self.shape, len(self._base[precision.weights]))
        self.copy: MergedCopy | None = None

    @property
    def copy_bytes(self) -> int:
        """What `take_copy` would take."""
        return copy_bytes(self._base, self._linears)

    def take_copy(self, implementation: Implementation) -> None:
        """Takes the memory of the merged copy."""
        self.copy = MergedCopy(self._base, self._linears, implementation=implementation)

    def leaves(self, dtype: np.dtype, *, merged: bool) -> Leaves:
        """The flat weights for a step."""
        if not merged:
            return self._base[dtype]
        assert self.copy is not None  # nothing is folded into a copy that there is not
        return self.copy.leaves(dtype)

    def energy(self) -> dict[str, list[BaseEnergy[float]]]:
        """Site -> energies of each layer's linear; see `lora.strength`.

        Waits for the device. Of the dtype that loses most.
        """
        dtype = max(self._base, key=lambda dtype: jax.numpy.finfo(dtype).eps)
        energy: dict[str, dict[int, BaseEnergy[jax.Array]]] = {}
        for linear in self._linears:
            parts = base_energy(self._base[dtype][linear.leaf], columns=linear.columns)
            for site, part in zip(linear.sites, parts, strict=True):
                energy.setdefault(site, {})[linear.layer] = part
        by_site = jax.device_get(energy)
        return {
            site: [BaseEnergy(*map(float, of[i])) for i in sorted(of)]
            for site, of in by_site.items()
        }


def _split(
    model: Model, spec: ModelSpec, precision: Precision
) -> tuple[ModelShape, Mapping[np.dtype, Leaves]]:
    """The module without weights, and its flat weights for each dtype that steps run in."""
    graphdef, state = nnx.split(model, nnx.Param)
    leaves, treedef = jax.tree.flatten(state)
    shape = ModelShape(graphdef=graphdef, treedef=treedef, layers=spec.layers)
    by_dtype = {precision.weights: leaves}
    if precision.prompts != precision.weights:
        weights = {path: leaf.get_value() for path, leaf in parameter_paths(model).items()}
        cast = with_weights(spec, in_dtype(weights, precision.prompts), dtype=precision.weights)
        by_dtype[precision.prompts] = jax.tree.leaves(nnx.state(cast, nnx.Param))
    return shape, by_dtype


def _merged_linears(shape: ModelShape, leaves: int) -> list[MergedLinear]:
    """The decoder's linears, found in a module that has places in the list for weights."""
    places: Any = [np.int32(place) for place in range(leaves)]
    model: Any = shape.merge(places)
    return [
        MergedLinear(
            leaf=int(module.kernel.get_value()),
            sites=module.sites,
            columns=(0, *module.splits),
            layer=module.layer,
        )
        for _, module in nnx.iter_modules(model)
        if isinstance(module, Linear) and any(site.startswith(DECODER) for site in module.sites)
    ]
