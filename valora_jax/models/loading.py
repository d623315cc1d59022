"""Streams a Hugging Face checkpoint into arrays of ours, shared by all families.

Names, shapes and dtypes are checked from the headers before a number is read, so a wrong checkpoint
is refused at once with every fault. Then one parameter after the other is read, laid out, cast,
checked for NaN and put on the device, in the order of the shards: beside the finished weights the
host holds the shard that is open and one parameter.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import DTypeLike

from valora_jax.errors import CheckpointError
from valora_jax.models.progress import byte_bar
from valora_jax.models.weight_map import Entry, is_finite, mismatches, resolve
from valora_jax.tensorfiles import Checkpoint, TensorInfo, open_checkpoint

_FLOATS = ("float16", "bfloat16", "float32")


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the folder's `config.json`.

    Raises:
      CheckpointError: the file is missing, unreadable or not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        why = "no such folder" if not folder.is_dir() else error.strerror
        raise CheckpointError([f"{path}: {why}"]) from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise CheckpointError([f"{path} is not JSON: {error}"]) from error
    if not isinstance(config, dict):
        raise CheckpointError([f"{path} holds a {type(config).__name__}, want a JSON object"])
    return config


def load_weights(
    folder: Path,
    entries: Sequence[Entry],
    *,
    canonical: Callable[[str], str],
    ignored: tuple[str, ...],
    dtype: DTypeLike | None,
    put: Callable[[np.ndarray], jax.Array] = jax.device_put,
    progress: bool,
) -> dict[str, jax.Array]:
    """Loads the checkpoint in `folder` as the parameters that `entries` describe.

    Args:
      folder: `.safetensors` or torch `.bin`, one file or shards with an index.
      entries: the family's weight map for the size that the config asks for.
      canonical: maps a file's tensor name onto the one in the map.
      ignored: endings of tensor names that are no parameters.
      dtype: what the weights are cast to; None keeps each as it is stored.
      put: places one finished array, in our layout, on the device.
      progress: shows a bar on stderr.

    Returns:
      Our path -> array, one for every entry.

    Raises:
      TensorFileError: the folder has no tensors, or files are damaged or missing.
      CheckpointError: tensors are missing, unknown or of the wrong shape or kind, or hold NaN or
        infinity; lists every fault.
    """
    checkpoint = open_checkpoint(folder)
    infos = {name: i for name, i in checkpoint.infos.items() if not name.endswith(ignored)}
    entries = _fit(entries, infos, canonical, mixed_dtypes=dtype is not None)
    weights: dict[str, jax.Array] = {}
    problems: list[str] = []
    total_bytes = sum(infos[name].size_bytes for entry in entries for name in entry.hf)
    with byte_bar("loading weights", total_bytes, shown=progress) as advance:
        for entry, parts in _read(checkpoint, entries):
            with np.errstate(over="ignore", invalid="ignore"):  # reported by name below
                array = entry.join(parts, np.dtype(dtype or parts[0].dtype))
            if not is_finite(array):
                problems += _not_finite(entry, parts, array.dtype)
            elif not problems:
                # Waiting keeps the host from running ahead of a slow copy to the device.
                weights[entry.ours] = jax.block_until_ready(put(array))
            advance(sum(part.nbytes for part in parts))
            del array, parts  # or they would stay while the next ones are read
    if problems:
        raise CheckpointError(problems)
    return weights


def _fit(
    entries: Sequence[Entry],
    infos: Mapping[str, TensorInfo],
    canonical: Callable[[str], str],
    *,
    mixed_dtypes: bool,
) -> list[Entry]:
    """The table in this checkpoint's own names, or every fault that the headers show."""
    stored: dict[str, str] = {}
    problems = [
        f"{name} and {twin} are the same parameter"
        for name in infos
        if (twin := stored.setdefault(canonical(name), name)) != name
    ]
    fitted = [
        dataclasses.replace(entry, hf={stored.get(n, n): shape for n, shape in entry.hf.items()})
        for entry in resolve(entries, stored)
    ]
    problems += mismatches(fitted, {name: info.shape for name, info in infos.items()})
    problems += _dtype_faults(fitted, infos, mixed=mixed_dtypes)
    if problems:
        raise CheckpointError(problems)
    return fitted


def _dtype_faults(
    entries: Sequence[Entry], infos: Mapping[str, TensorInfo], *, mixed: bool
) -> list[str]:
    """Tensors that are not floats and, unless `mixed`, parts of one parameter that differ."""
    problems = []
    for entry in entries:
        dtypes = {name: infos[name].dtype.name for name in entry.hf if name in infos}
        problems += [
            f"{name}: dtype {dtype}, want one of {', '.join(_FLOATS)}"
            for name, dtype in dtypes.items()
            if dtype not in _FLOATS
        ]
        if not mixed and len(set(dtypes.values())) > 1:
            problems.append(
                f"{entry.ours}: its parts differ in dtype, name one to cast to: {dtypes}"
            )
    return problems


def _read(
    checkpoint: Checkpoint, entries: Sequence[Entry]
) -> Iterator[tuple[Entry, list[np.ndarray]]]:
    """Reads every entry's parts while the shard with the last of them is open.

    Parts in earlier shards are fetched again then instead of being kept: a checkpoint that spreads
    all its layers over the shards would otherwise fill the host.
    """
    due: dict[Path, list[Entry]] = {path: [] for path in checkpoint.shards}
    for entry in entries:
        holders = {checkpoint.shard_of[name] for name in entry.hf}
        due[max(holders, key=checkpoint.shards.index)].append(entry)
    for shard in checkpoint.stream():
        for entry in due[shard.path]:
            sources = ((shard if n in shard.infos else checkpoint, n) for n in entry.hf)
            yield entry, [source.read(name) for source, name in sources]


def _not_finite(entry: Entry, parts: Sequence[np.ndarray], dtype: np.dtype) -> list[str]:
    """Names the tensors to blame for numbers that are not finite after the cast."""
    blamed = [name for name, part in zip(entry.hf, parts, strict=True) if not is_finite(part)]
    if blamed:
        return [f"{name}: holds NaN or infinity" for name in blamed]
    return [f"{' or '.join(entry.hf)}: holds numbers too large for {dtype}"]
