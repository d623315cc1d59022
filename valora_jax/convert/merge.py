"""Folds an adapter into a checkpoint: float32 arithmetic, one rounding to the dtype written.

    W' = W + scale * B @ A

A replaced linear or head stands in for W. A head that was tied to the embedding and is changed
becomes a tensor of its own, and the written config says so. N output width, K input width, R rank.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from valora_jax.checkpoint.folder import is_orbax
from valora_jax.convert.folders import copy_side_files, new_folder
from valora_jax.convert.layouts import written_like
from valora_jax.convert.models import MAX_SHARD_BYTES
from valora_jax.convert.shards import ShardWriter
from valora_jax.errors import CheckpointError, TensorFileError
from valora_jax.lora.adapter import Adapter, Linear, LoraPair
from valora_jax.lora.combine import Kind, combine, with_base
from valora_jax.lora.read import read_adapter
from valora_jax.models import ModelSpec, read_spec
from valora_jax.models.loading import read_config
from valora_jax.models.progress import byte_bar
from valora_jax.models.weight_map import is_finite, mismatches, resolve
from valora_jax.tensorfiles import Checkpoint, open_checkpoint

Dtype = Literal["float32", "float16", "bfloat16"]


def merge_adapter(
    folder: Path,
    adapter: Adapter,
    out: Path,
    *,
    dtype: Dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Writes the checkpoint in `folder` with `adapter` folded in to `out`, a folder like it.

    Holds one shard of the output and a few float32 copies of one tensor.

    Args:
      folder: a Hugging Face checkpoint.
      adapter: bound to this model; may still need its base.
      out: a new folder; side files are copied, `config.json` says what changed.
      dtype: of all float tensors written; None keeps each as it is stored.
      max_shard_bytes: of one file of the output.
      overwrite: whether `out` may hold something, which is then replaced.
      progress: shows a bar on stderr.

    Raises:
      ValueError: the adapter has a task head, a bias for a linear that has none, or the merged
        numbers do not fit the dtype; or `out` cannot be written to.
      TensorFileError, CheckpointError, NotImplementedError: as when `folder` is loaded.
    """
    if (head := adapter.task_head) is not None:
        raise ValueError(
            f"adapter {adapter.name!r} has the task head {head.module!r}, for which a checkpoint "
            "of this model has no place; serve it as an adapter instead"
        )
    base = _Base(folder)
    changes = _changes(base, adapter)
    with new_folder(out, sources=(folder,), overwrite=overwrite) as built:
        writer = ShardWriter(built, max_shard_bytes=max_shard_bytes)
        with byte_bar("merging", base.checkpoint.size_bytes, shown=progress) as advance:
            for name, array in base.stream(changes):
                want = np.dtype(dtype or array.dtype) if _is_float(array.dtype) else array.dtype
                writer.add(
                    name, _merged(name, array, changes.pop(base.canonical(name), None), want)
                )
                advance(array.nbytes)
        writer.finish()
        copy_side_files(folder, built)
        _write_config(built, base.config, dtype=dtype, untied=base.unties)


def read_combination(
    model: Path, parts: Sequence[tuple[str, Path, float]], *, kind: Kind = "cat"
) -> Adapter:
    """Reads adapters (name, folder, weight) of a model and makes one of them.

    Raises:
      AdapterError, TensorFileError, NotImplementedError: an adapter cannot be read or bound.
      ValueError: they cannot be combined, see `lora.combine.combine`.
    """
    base = _Base(model)
    target = base.spec.adapter_target
    adapters = [read_adapter(folder, name=name, target=target) for name, folder, _ in parts]
    if len(parts) == 1 and parts[0][2] == 1.0:
        return adapters[0]  # replaced weights are then taken as they are
    settled = [with_base(a, linear_of=base.linear, head_VD=base.head) for a in adapters]
    weighted = [(a, weight) for a, (_, _, weight) in zip(settled, parts, strict=True)]
    return combine(" + ".join(name for name, _, _ in parts), weighted, kind=kind)


@dataclasses.dataclass(kw_only=True, slots=True)
class _Change:
    """What happens to one tensor."""

    replaced: np.ndarray | None = None
    pair: LoraPair | None = None
    added: np.ndarray | None = None

    def apply(self, stored: np.ndarray) -> np.ndarray:
        """The new values in float32; a new array."""
        new = (stored if self.replaced is None else self.replaced).astype(np.float32)
        if self.pair is not None:
            a_RK, b_RN = (x.astype(np.float32) for x in (self.pair.a_RK, self.pair.b_RN))
            delta_NK = b_RN.T @ a_RK
            delta_NK *= np.float32(self.pair.scale)
            new += delta_NK
        if self.added is not None:
            new += self.added
        return new


class _Base:
    """The checkpoint that is merged into, by canonical names."""

    def __init__(self, folder: Path):
        if is_orbax(folder):
            raise TensorFileError(folder, "an Orbax folder; `valora convert orbax-to-hf` it first")
        self.config = read_config(folder)
        self.spec: ModelSpec = read_spec(self.config)
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        self.canonical = self.spec.canonical_name
        infos = self.checkpoint.infos
        tensors = [name for name in infos if not name.endswith(self.spec.ignored_names)]
        self.name_of = {self.canonical(name): name for name in tensors}
        if twins := sorted(set(tensors) - set(self.name_of.values())):
            raise CheckpointError([f"{name} is there under another name too" for name in twins])
        shapes = {name: infos[stored].shape for name, stored in self.name_of.items()}
        if problems := mismatches(resolve(self.spec.entries, shapes), shapes):
            raise CheckpointError(problems)
        self.head_name = f"{self.spec.adapter_target.head_module}.weight"
        self._tied_to = next(
            (e.stand_in for e in self.spec.entries if self.head_name in e.hf), None
        )
        self.unties = False

    def stream(self, changes: dict[str, _Change]) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor of the output under its stored name, with the base's values."""
        self.unties = self._tied_to is not None and self.head_name in changes
        for shard in self.checkpoint.stream():
            for name in shard.names:
                yield name, shard.read(name)
        if self.unties and self.head_name not in self.name_of:
            names = self.checkpoint.names
            yield written_like(self.spec.model_type, self.head_name, names), self.head()

    def read(self, name: str) -> np.ndarray:
        return self.checkpoint.read(self.name_of[name])

    def head(self) -> np.ndarray:
        """The head's weight `[V, D]`, which is the embedding if it has none of its own."""
        return self.read(self.head_name if self.head_name in self.name_of else str(self._tied_to))

    def linear(self, site: str, layer: int) -> Linear:
        module = self.module(site, layer)
        bias = f"{module}.bias"
        return Linear(
            weight_NK=self.read(f"{module}.weight"),
            bias_N=self.read(bias) if bias in self.name_of else None,
        )

    def module(self, site: str, layer: int) -> str:
        kinds = {kind.name: kind for kind in self.spec.adapter_target.sites}
        return kinds[site].module_of(layer)


def _changes(base: _Base, adapter: Adapter) -> dict[str, _Change]:
    """Canonical tensor name -> its change, for every tensor that the adapter touches."""
    changes: dict[str, _Change] = {}

    def change(name: str) -> _Change:
        return changes.setdefault(name, _Change())

    for site, layers in adapter.replaced_linears.items():
        for layer, linear in layers.items():
            change(f"{base.module(site, layer)}.weight").replaced = linear.weight_NK
            if linear.bias_N is not None:
                change(f"{base.module(site, layer)}.bias").replaced = linear.bias_N
    for site, layers in adapter.pairs.items():
        for layer, pair in layers.items():
            change(f"{base.module(site, layer)}.weight").pair = pair
            if pair.bias_N is not None:
                change(f"{base.module(site, layer)}.bias").added = pair.bias_N
    if (head_VD := _new_head(base, adapter)) is not None:
        change(base.head_name).replaced = head_VD
    if strays := sorted(changes.keys() - base.name_of.keys() - {base.head_name}):
        raise ValueError(
            f"adapter {adapter.name!r} changes what the model does not have: {', '.join(strays)}"
        )
    return changes


def _new_head(base: _Base, adapter: Adapter) -> np.ndarray | None:
    """The head that the adapter brings, unless it is a mere copy of the base's.

    PEFT puts the copy in the base's place when it loads the adapter, so one that was rounded when
    it was saved counts as new.
    """
    if (copy_VD := adapter.base_head_copy_VD) is None:
        return adapter.replaced_head_VD
    same = np.array_equal(copy_VD.astype(np.float32), base.head().astype(np.float32))
    return None if same else copy_VD


def _merged(name: str, array: np.ndarray, change: _Change | None, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # reported by name below
        new = (array if change is None else change.apply(array)).astype(dtype, copy=False)
    if (change is not None or dtype != array.dtype) and not is_finite(new):
        raise ValueError(f"{name}: the merged numbers are too large for {dtype}; try float32")
    return new


def _is_float(dtype: np.dtype) -> bool:
    return dtype.name in ("float16", "bfloat16", "float32", "float64")


def _write_config(
    folder: Path, config: dict[str, Any], *, dtype: Dtype | None, untied: bool
) -> None:
    """Rewrites `config.json` where the merge made it untrue; otherwise it stays as it was."""
    if dtype is None and not untied:
        return
    sections = [config, *(v for v in config.values() if isinstance(v, dict))]
    if dtype is not None:
        config.setdefault("dtype" if "torch_dtype" not in config else "torch_dtype", dtype)
        for section in sections:
            section |= {key: dtype for key in ("dtype", "torch_dtype") if key in section}
    if untied:  # both places count, and a missing one may have a default
        config["tie_word_embeddings"] = False
        config.setdefault("text_config", {})["tie_word_embeddings"] = False
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
