"""Binds the tensors of an adapter file to a model's sites, or lists every fault at once.

K input width, N output width, R rank, V vocabulary rows, D model width, C classes.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np

from valora_jax.errors import AdapterError
from valora_jax.lora.adapter import Adapter, AdapterTarget, Linear, LoraPair, LoraSite, TaskHead
from valora_jax.lora.peft_config import PeftConfig

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)\."
    r"(?P<kind>lora_A\.weight|lora_B\.weight|base_layer\.weight|weight|bias)"
)
# Parts of keys that are legal PEFT and not served.
_NOT_SERVED = {
    ".lora_embedding_": "LoRA on an embedding",
    ".lora_magnitude_vector": "DoRA",
    ".lora_B.bias": "a bias inside LoRA (lora_bias)",
    ".base_layer.bias": "trained biases of the base",
    ".trainable_tokens_": "trained token rows",
}
_FLOATS = tuple(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))
# PEFT saves whichever of the two a sequence classifier has, and lists both.
_PEFT_HEADS = {"classifier", "score"}
_MOST_PROBLEMS = 40


def bind(
    tensors: Mapping[str, np.ndarray],
    *,
    config: PeftConfig,
    target: AdapterTarget,
    name: str,
    source: str,
) -> Adapter:
    """Sorts an adapter's tensors by what they mean for a model.

    Args:
      tensors: by PEFT key (`base_model.model.…`). float16 becomes float32 exactly; float64 is
        rounded to it.
      config: ranks and scales.
      target: the model; `canonical_name` decides which key layouts are understood.
      name: for the adapter and for messages.
      source: where it came from, for people.

    Raises:
      AdapterError: some tensors bind to nothing, do not fit, or are no finite numbers.
      NotImplementedError: some tensors mean what is not served.
    """
    binder = _Binder(tensors, config, target)
    for module, parts in binder.modules.items():
        binder.bind(module, parts)
    binder.check_saved_modules()
    if binder.not_served:
        lines = [f"adapter {name!r} needs what is not served:", *sorted(binder.not_served)]
        raise NotImplementedError("\n  ".join(lines))
    if not tensors:
        binder.problems.append("the file holds no tensors")
    if problems := binder.problems:
        rest = len(problems) - _MOST_PROBLEMS
        shown = sorted(problems)[:_MOST_PROBLEMS]
        raise AdapterError(name, [*shown, f"… and {rest} more"] if rest > 0 else shown)
    return dataclasses.replace(binder.adapter, name=name, source=source)


class _Binder:
    def __init__(
        self, tensors: Mapping[str, np.ndarray], config: PeftConfig, target: AdapterTarget
    ):
        self.problems: list[str] = []
        self.not_served: set[str] = set()
        self.modules: dict[str, dict[str, np.ndarray]] = {}
        self._config, self._target = config, target
        self._instances = target.instances()
        self._pairs: dict[str, dict[int, LoraPair]] = {}
        self._linears: dict[str, dict[int, Linear]] = {}
        self._fields: dict[str, object] = {}
        self._refused: set[str] = set()
        for key, array in tensors.items():
            self._sort(key, array)

    @property
    def adapter(self) -> Adapter:
        # Sites in the model's order, not the file's: it is what people read.
        order = [site.name for site in self._target.sites]
        return Adapter(
            name="",
            source="",
            pairs={site: self._pairs[site] for site in order if site in self._pairs},
            replaced_linears={s: self._linears[s] for s in order if s in self._linears},
            **self._fields,  # pyright: ignore[reportArgumentType]
        )

    def _sort(self, key: str, array: np.ndarray) -> None:
        """Files a tensor under its module, unless its key or its values already refuse it."""
        if reason := next((why for part, why in _NOT_SERVED.items() if part in key), None):
            self.not_served.add(reason)
            return
        if (match := _KEY.fullmatch(key)) is None:
            self.problems.append(f"{key}: not the key of a LoRA or saved tensor")
            return
        fault = None
        if array.dtype not in _FLOATS:
            fault = f"holds {array.dtype}, want floating point"
        elif array.dtype != ml_dtypes.bfloat16:
            with np.errstate(over="ignore"):  # a float64 out of range becomes Inf, caught below
                array = array.astype(np.float32)
        if fault is None and not np.isfinite(array).all():
            fault = "holds NaN or Inf"
        parts = self.modules.setdefault(match["module"], {})
        if fault is None:
            parts[match["kind"]] = array
        else:
            self.problems.append(f"{key}: {fault}")
            self._refused.add(match["module"])

    def bind(self, module: str, parts: dict[str, np.ndarray]) -> None:
        """Binds all tensors of one module of the file."""
        if module in self._refused:
            return  # a part is already reported; what it lacks would only repeat that
        place = self._target.canonical_name(module)
        low_rank = {
            kind: parts[kind] for kind in ("lora_A.weight", "lora_B.weight") if kind in parts
        }
        saved = {kind: parts[kind] for kind in ("weight", "bias") if kind in parts}
        if low_rank:
            self._bind_pair(module, place, low_rank)
        if saved:
            self._bind_saved(module, place, saved)
        if (copy_VD := parts.get("base_layer.weight")) is None:
            return
        if place != self._target.head_module:
            self.not_served.add(f"a copy of a base weight other than the head ({module})")
        elif self._fits(f"{module}.base_layer.weight", copy_VD, self._head_shape):
            self._fields["base_head_copy_VD"] = copy_VD

    @property
    def _head_shape(self) -> tuple[int, int]:
        return self._target.vocab_rows, self._target.width

    def _bind_pair(self, module: str, place: str, parts: dict[str, np.ndarray]) -> None:
        if (instance := self._instances.get(place)) is None:
            self.problems.append(f"{module}: {_why_nowhere(place, self._target.sites)}")
            return
        if absent := [k for k in ("lora_A.weight", "lora_B.weight") if k not in parts]:
            self.problems.append(f"{module}: lacks {absent[0]}")
            return
        site, layer = instance
        rank = self._config.rank_of(module)
        a_RK, b_NR = parts["lora_A.weight"], parts["lora_B.weight"]
        K, N, found = site.in_width, site.out_width, a_RK.shape[0] if a_RK.ndim else 0
        if found != rank and (a_RK.shape, b_NR.shape) == ((found, K), (N, found)):
            self.problems.append(f"{module}: rank {found}, adapter_config.json says {rank}")
            return
        fits = [
            self._fits(f"{module}.lora_A.weight", a_RK, (rank, K)),
            self._fits(f"{module}.lora_B.weight", b_NR, (N, rank)),
        ]
        if not all(fits):
            return
        pair = LoraPair(
            a_RK=a_RK, b_RN=np.ascontiguousarray(b_NR.T), scale=self._config.scale_of(module)
        )
        self._place(self._pairs, site, layer, pair, module)

    def _bind_saved(self, module: str, place: str, parts: dict[str, np.ndarray]) -> None:
        """Binds a whole module: the head, a linear of the model, or a new task head."""
        weight, bias = parts.get("weight"), parts.get("bias")
        is_head, instance = place == self._target.head_module, self._instances.get(place)
        if not (is_head or instance or self._may_be_saved(module)):
            self.problems.append(f"{module}: {_why_nowhere(place, self._target.sites)}")
        elif weight is None or (is_head and bias is not None):
            self.not_served.add(f"a trained bias ({module})")
        elif is_head:
            if self._fits(f"{module}.weight", weight, self._head_shape):
                self._fields["replaced_head_VD"] = weight
        elif instance:
            site, layer = instance
            if self._fits_linear(module, weight, bias, (site.out_width, site.in_width)):
                linear = Linear(weight_NK=weight, bias_N=bias)
                self._place(self._linears, site, layer, linear, module)
        elif "." in module:  # inside the model: embeddings, norms
            self.not_served.add(f"a replaced {module}")
        elif "task_head" in self._fields:
            self.not_served.add(f"more than one new head ({module})")
        elif self._fits_linear(module, weight, bias, (*weight.shape[:1], self._target.width)):
            self._fields["task_head"] = TaskHead(module=module, weight_CD=weight, bias_C=bias)

    def _place[T](
        self, bound: dict[str, dict[int, T]], site: LoraSite, layer: int, item: T, module: str
    ) -> None:
        if bound.setdefault(site.name, {}).setdefault(layer, item) is not item:
            self.problems.append(f"{module}: layer {layer} of {site.name} is bound by another key")

    def _may_be_saved(self, module: str) -> bool:
        listed = any(module.endswith(name) for name in self._config.modules_to_save)
        return listed or module in _PEFT_HEADS or self._config.bias != "none"

    def _fits_linear(
        self, module: str, weight: np.ndarray, bias: np.ndarray | None, shape: tuple[int, ...]
    ) -> bool:
        fits = [self._fits(f"{module}.weight", weight, shape)]
        if bias is not None:
            fits.append(self._fits(f"{module}.bias", bias, shape[:1]))
        return all(fits)

    def _fits(self, key: str, array: np.ndarray, shape: tuple[int, ...]) -> bool:
        if array.shape == shape:
            return True
        hint = " (it is transposed)" if array.shape == shape[::-1] else ""
        self.problems.append(f"{key}: shape {array.shape}, want {shape}{hint}")
        return False

    def check_saved_modules(self) -> None:
        """Notes the modules that the config says were trained and the file does not hold."""
        listed = set(self._config.modules_to_save)
        found = {n for n in listed if any(m.endswith(n) for m in self.modules)}
        missing = listed - found - (_PEFT_HEADS if found & _PEFT_HEADS else set())
        self.problems += [f"modules_to_save names {n!r}, no tensor of it is left" for n in missing]


def _why_nowhere(place: str, sites: Iterable[LoraSite]) -> str:
    for site in sites:
        if (layer := site.layer_in(place)) is not None:
            return f"layer {layer} of {site.name} does not exist, the model has {site.layers}"
    return "binds to nothing in this model"
