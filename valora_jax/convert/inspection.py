"""What a folder holds: a model or an adapter, in the files of Hugging Face or in Orbax.

Only headers and configs are read, unless an adapter is bound to a model. The reports are plain
data; fields that a folder has no answer for are None.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from valora_jax.checkpoint.arrays import read_infos
from valora_jax.checkpoint.folder import WEIGHTS, is_orbax, read_manifest
from valora_jax.checkpoint.loading import faults, stored_entries
from valora_jax.convert.folders import side_files
from valora_jax.convert.layouts import layout_of
from valora_jax.errors import ValoraError
from valora_jax.lora.read import read_adapter
from valora_jax.media import Tokenizer
from valora_jax.models import ModelSpec, read_spec
from valora_jax.models.loading import read_config
from valora_jax.models.weight_map import mismatches, resolve
from valora_jax.tensorfiles import ADAPTER_FILES, Checkpoint, TensorInfo, open_checkpoint

_ADAPTER_CONFIG = "adapter_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tensors:
    """Sums over tensors.

    Attributes:
      format: "safetensors", "bin" or "orbax".
      files: how many files the tensors lie in; None for Orbax, which cuts them as it likes.
      tensors: how many there are.
      parameters: numbers in them; a head tied to the embedding is not counted again.
      size_bytes: of the numbers alone.
      dtypes: dtype -> how many numbers are stored in it.
    """

    format: str
    files: int | None
    tensors: int
    parameters: int
    size_bytes: int
    dtypes: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelReport:
    """A model folder; `served` says yes or why not, `layout` how its tensors are named."""

    kind: str = "model"
    folder: str
    model_type: str
    served: str
    weights: Tensors
    layout: str | None
    layers: int | None
    width: int | None
    kv_heads: int | None
    head_width: int | None
    vocab_rows: int | None
    max_positions: int | None
    image_pixels: str | None
    tokens_per_image: int | None
    head_is_tied: bool | None
    tokenizer_vocabulary: int | None
    special_tokens: Mapping[str, str] | None
    stop_token_ids: tuple[int, ...] | None
    chat_template: bool | None
    tokenizer_problem: str | None
    side_files: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterReport:
    """An adapter folder.

    `modules` are the linears that carry LoRA, numbers of layers replaced by `{i}`, with their
    count; `whole_tensors` what the adapter brings as a whole. `bound` is there with a model.
    """

    kind: str = "adapter"
    folder: str
    peft_type: str
    base_model: str | None
    task_type: str | None
    rank: int | None
    ranks: tuple[int, ...]
    alpha: float | None
    scaling: str
    rank_pattern: Mapping[str, int] | None
    alpha_pattern: Mapping[str, float] | None
    modules: Mapping[str, int]
    whole_tensors: tuple[str, ...]
    weights: Tensors
    bound: str | None
    scales: tuple[float, ...] | None
    served: str | None
    side_files: tuple[str, ...]


def inspect_folder(folder: Path, *, model: Path | None = None) -> ModelReport | AdapterReport:
    """Reports on a folder; an adapter is bound to `model` if that is given.

    Raises:
      TensorFileError: there are no tensors in `folder`, or files are damaged.
      CheckpointError: a config is missing or no JSON.
    """
    if (folder / _ADAPTER_CONFIG).is_file():
        return _adapter_report(folder, model)
    return _model_report(folder)


def _model_report(folder: Path) -> ModelReport:
    config = read_config(folder)
    spec, served = _spec(config)
    if is_orbax(folder):
        manifest, infos = read_manifest(folder, kind="model"), read_infos(folder / WEIGHTS)
        names, weights = manifest.tensors, _sums(infos, file_format="orbax", files=None)
        if spec is not None:
            served = _fit(faults(stored_entries(spec, infos), infos, kept=manifest.kept))
    else:
        checkpoint = open_checkpoint(folder)
        names, weights = checkpoint.names, _sums_of_files(checkpoint)
        if spec is not None:
            served = _fit(_mismatches(spec, checkpoint))
    model_type = str(config.get("model_type"))
    return ModelReport(
        folder=str(folder),
        model_type=model_type,
        served=served,
        weights=weights,
        layout=layout_of(model_type, names),
        **_sizes(spec, names),
        **_tokenizer_facts(folder),
        side_files=tuple(map(str, side_files(folder))),
    )


def _spec(config: dict[str, Any]) -> tuple[ModelSpec | None, str]:
    try:
        return read_spec(config), "yes"
    except (ValoraError, NotImplementedError) as error:
        return None, f"no: {error}"


def _mismatches(spec: ModelSpec, checkpoint: Checkpoint) -> list[str]:
    shapes = {
        spec.canonical_name(name): info.shape
        for name, info in checkpoint.infos.items()
        if not name.endswith(spec.ignored_names)
    }
    return mismatches(resolve(spec.entries, shapes), shapes)


def _fit(problems: list[str]) -> str:
    if not problems:
        return "yes"
    return "\n  ".join(["no, the tensors are not those of the config:", *sorted(problems)])


def _sizes(spec: ModelSpec | None, names: tuple[str, ...]) -> dict[str, Any]:
    if spec is None:
        facts = ("layers", "width", "kv_heads", "head_width", "vocab_rows", "max_positions")
        return dict.fromkeys((*facts, "image_pixels", "tokens_per_image", "head_is_tied"))
    _, height, width = spec.pixel_shape
    return dict(
        layers=spec.layers,
        width=spec.width,
        kv_heads=spec.kv_heads,
        head_width=spec.head_width,
        vocab_rows=spec.vocab_rows,
        max_positions=spec.max_positions,
        image_pixels=f"{width} x {height}",
        tokens_per_image=spec.tokens_per_image,
        head_is_tied=f"{spec.adapter_target.head_module}.weight"
        not in map(spec.canonical_name, names),
    )


def _tokenizer_facts(folder: Path) -> dict[str, Any]:
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except ValueError as error:
        facts = ("tokenizer_vocabulary", "special_tokens", "stop_token_ids", "chat_template")
        return dict.fromkeys(facts) | {"tokenizer_problem": str(error)}
    return dict(
        tokenizer_vocabulary=tokenizer.vocab_size,
        special_tokens=tokenizer.special_tokens,
        stop_token_ids=tokenizer.stop_token_ids,
        chat_template=tokenizer.chat_template is not None,
        tokenizer_problem=None,
    )


def _adapter_report(folder: Path, model: Path | None) -> AdapterReport:
    config = _adapter_config(folder)
    if is_orbax(folder):
        read_manifest(folder, kind="adapter")
        infos = read_infos(folder / WEIGHTS)
        weights = _sums(infos, file_format="orbax", files=None)
    else:
        checkpoint = open_checkpoint(folder, files=ADAPTER_FILES)
        infos, weights = checkpoint.infos, _sums_of_files(checkpoint)
    ranks = {info.shape[0] for name, info in infos.items() if name.endswith(".lora_A.weight")}
    low_rank = [name.partition(".lora_")[0] for name in infos if ".lora_" in name]
    return AdapterReport(
        folder=str(folder),
        peft_type=str(config.get("peft_type")),
        base_model=config.get("base_model_name_or_path"),
        task_type=config.get("task_type"),
        rank=config.get("r"),
        ranks=tuple(sorted(ranks)),
        alpha=config.get("lora_alpha"),
        scaling="alpha / sqrt(rank)" if config.get("use_rslora") else "alpha / rank",
        rank_pattern=config.get("rank_pattern") or None,
        alpha_pattern=config.get("alpha_pattern") or None,
        modules=_counted(set(low_rank)),
        whole_tensors=tuple(sorted(name for name in infos if ".lora_" not in name)),
        weights=weights,
        **_binding(folder, model),
        side_files=tuple(map(str, side_files(folder))),
    )


def _adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / _ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, want a JSON object")
    return config


def _counted(modules: set[str]) -> dict[str, int]:
    """Module paths with `{i}` for every number in them -> how many there are."""
    parts = (module.removeprefix("base_model.model.").split(".") for module in sorted(modules))
    return dict(
        collections.Counter(".".join("{i}" if p.isdigit() else p for p in path) for path in parts)
    )


def _binding(folder: Path, model: Path | None) -> dict[str, Any]:
    if model is None:
        return dict(bound=None, scales=None, served=None)
    target = read_spec(read_config(model)).adapter_target
    try:
        adapter = read_adapter(folder, name=folder.name, target=target)
    except (ValoraError, NotImplementedError) as error:
        return dict(bound=None, scales=None, served=f"no: {error}")
    scales = {pair.scale for layers in adapter.pairs.values() for pair in layers.values()}
    return dict(bound=adapter.bound(), scales=tuple(sorted(scales)), served="yes")


def _sums_of_files(checkpoint: Checkpoint) -> Tensors:
    file_format = checkpoint.shards[0].suffix[1:]
    return _sums(checkpoint.infos, file_format=file_format, files=len(checkpoint.shards))


def _sums(infos: Mapping[str, TensorInfo], *, file_format: str, files: int | None) -> Tensors:
    dtypes: dict[str, int] = collections.defaultdict(int)
    for info in infos.values():
        dtypes[info.dtype.name] += math.prod(info.shape)
    return Tensors(
        format=file_format,
        files=files,
        tensors=len(infos),
        parameters=sum(dtypes.values()),
        size_bytes=sum(info.size_bytes for info in infos.values()),
        dtypes=dict(sorted(dtypes.items())),
    )
