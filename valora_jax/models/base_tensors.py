"""Reads single tensors of a loaded model back under their checkpoint names, for adapters."""

import numpy as np

from valora_jax.lora.adapter import Linear
from valora_jax.models.build import parameter_paths
from valora_jax.models.spec import Model, ModelSpec


class BaseTensors:
    """What adapters that replace whole weights are compared with."""

    def __init__(self, model: Model, spec: ModelSpec):
        self._parameters, self._target = parameter_paths(model), spec.adapter_target
        self._entry_of = {name: entry for entry in spec.entries for name in entry.hf}

    def read(self, name: str) -> np.ndarray | None:
        """The tensor of a canonical name, `[out, in]`; None if the model has none."""
        if (entry := self._entry_of.get(name)) is None:
            return None
        return entry.split(np.asarray(self._parameters[entry.ours].get_value()))[name]

    def linear(self, site: str, layer: int) -> Linear:
        """A LoRA site's linear."""
        sites = {site.name: site for site in self._target.sites}
        module = sites[site].module_of(layer)
        weight_NK, bias_N = self.read(f"{module}.weight"), self.read(f"{module}.bias")
        assert weight_NK is not None  # the sites and the weight map describe the same model
        return Linear(
            weight_NK=weight_NK, bias_N=None if bias_N is None else bias_N.astype(np.float32)
        )

    def head(self) -> np.ndarray:
        """The output head `[V, D]`."""
        head_VD = self.read(f"{self._target.head_module}.weight")
        assert head_VD is not None
        return head_VD
