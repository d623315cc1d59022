"""`adapter_config.json` of a PEFT folder: ranks, scales, and a refusal of what is not plain LoRA.

    scale = alpha / r, or alpha / sqrt(r) with use_rslora

r and alpha come from rank_pattern and alpha_pattern where a key of theirs matches the module.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from valora_jax.errors import AdapterError

# Fields that say how the adapter was trained and change nothing in what it computes, or that this
# module reads. Any other field with a value in it is refused: a new PEFT feature, served as if it
# were not there, would give wrong answers without a word.
_READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
_READ |= {"modules_to_save", "task_type", "base_model_name_or_path", "bias", "init_lora_weights"}
_HARMLESS = {
    *("auto_mapping", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout"),
    *("megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    "target_modules",
}
# Initialisations that leave the base weights alone. The others (pissa, olora, loftq, corda, …)
# train against a changed base, which the file does not hold.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_CONFIG = "adapter_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PeftConfig:
    """What of the config decides the numbers."""

    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    modules_to_save: tuple[str, ...]
    bias: str
    base_model: str

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its path without `base_model.model.`."""
        return _first_match(self.rank_pattern, module, otherwise=self.r)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = _first_match(self.alpha_pattern, module, otherwise=self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _first_match[T](pattern: Mapping[str, T], module: str, *, otherwise: T) -> T:
    """PEFT's rule: the first key, in file order, that is a regex for the end of the path."""
    hits = (v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(hits, otherwise)


def read_config(folder: Path, *, name: str) -> PeftConfig:
    """Reads and checks `adapter_config.json`.

    Raises:
      AdapterError: it is missing, no JSON object, or has fields that make no sense (all listed).
      NotImplementedError: it asks for something other than plain LoRA.
    """
    raw = _load(folder, name)
    kind = raw.get("peft_type")
    if kind is not None and kind != "LORA":
        raise NotImplementedError(f"adapter {name!r} has peft_type {kind!r}; only LORA is served")
    strange = {k: v for k, v in raw.items() if k not in _READ | _HARMLESS and v}
    if (init := raw.get("init_lora_weights", True)) not in _PLAIN_INITS:
        strange["init_lora_weights"] = init
    if strange:
        raise NotImplementedError(
            f"adapter {name!r} needs what is not served: "
            + ", ".join(f"{field}={value!r:.60}" for field, value in sorted(strange.items()))
        )
    checks = _Checks(raw)
    config = PeftConfig(
        r=checks.rank("r", raw.get("r")),
        alpha=checks.number("lora_alpha", raw.get("lora_alpha")),
        rank_pattern=checks.pattern("rank_pattern", checks.rank),
        alpha_pattern=checks.pattern("alpha_pattern", checks.number),
        use_rslora=checks.flag("use_rslora"),
        modules_to_save=checks.names("modules_to_save"),
        bias=str(raw.get("bias") or "none"),
        base_model=str(raw.get("base_model_name_or_path") or "an unnamed base"),
    )
    if checks.problems:
        raise AdapterError(name, [f"{_CONFIG}: {problem}" for problem in checks.problems])
    return config


def _load(folder: Path, name: str) -> dict:
    path = folder / _CONFIG
    if not path.is_file():
        raise AdapterError(name, [f"{path}: no such file"])
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(name, [f"{path}: not JSON: {error}"]) from error
    if not isinstance(raw, dict):
        raise AdapterError(name, [f"{path}: holds a {type(raw).__name__}, want an object"])
    return raw


class _Checks:
    """Reads fields of the raw config and notes every one that makes no sense."""

    def __init__(self, raw: dict):
        self._raw = raw
        missing = [f for f in ("peft_type", "r", "lora_alpha") if raw.get(f) is None]
        self.problems = [f"lacks {field!r}" for field in missing]

    def rank(self, field: str, value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if value is not None:
            self.problems.append(f"{field} is {value!r:.60}, want a positive whole number")
        return 1

    def number(self, field: str, value: object) -> float:
        # The bound keeps whole numbers of any length from overflowing a float.
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30:
            return float(value)
        if value is not None:
            self.problems.append(f"{field} is {value!r:.60}, want a finite number")
        return 1.0

    def pattern(self, field: str, check) -> dict:
        value = self._raw.get(field) or {}
        if not isinstance(value, dict):
            self.problems.append(f"{field} is a {type(value).__name__}, want an object")
            return {}
        for key in value:
            try:
                re.compile(f"({key})")
            except (re.error, RecursionError, OverflowError) as error:
                self.problems.append(f"{field} has the key {key!r:.60}: no regex: {error}")
                return {}
        return {key: check(f"{field}[{key!r:.60}]", item) for key, item in value.items()}

    def flag(self, field: str) -> bool:
        value = self._raw.get(field)
        if not isinstance(value, bool | None):
            self.problems.append(f"{field} is {value!r:.60}, want true or false")
        return value is True

    def names(self, field: str) -> tuple[str, ...]:
        value = self._raw.get(field) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.problems.append(f"{field} is {value!r:.60}, want a list of module names")
            return ()
        return tuple(value)
