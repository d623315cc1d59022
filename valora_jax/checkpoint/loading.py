"""Loads a model out of an Orbax folder, one parameter after the other."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.typing import DTypeLike

from valora_jax.checkpoint.arrays import read_arrays, read_infos
from valora_jax.checkpoint.folder import WEIGHTS, read_manifest
from valora_jax.errors import CheckpointError
from valora_jax.models.build import with_weights
from valora_jax.models.progress import byte_bar
from valora_jax.models.spec import Model, ModelSpec
from valora_jax.models.weight_map import Entry, is_finite
from valora_jax.tensorfiles import TensorInfo


def load_model(folder: Path, spec: ModelSpec, *, dtype: DTypeLike, progress: bool) -> Model:
    """Streams an Orbax folder into a module; raises what `load_weights` raises."""
    weights = load_weights(folder, spec, dtype=dtype, progress=progress)
    return with_weights(spec, weights, dtype=dtype)


def load_weights(
    folder: Path,
    spec: ModelSpec,
    *,
    dtype: DTypeLike | None,
    put: Callable[[np.ndarray], jax.Array] = jax.device_put,
    progress: bool,
) -> dict[str, jax.Array]:
    """Loads the parameters of an Orbax folder, as `models.loading.load_weights` does of others.

    Beside the finished weights the host holds at most 256 MB or one parameter.

    Args:
      folder: holds a model, see the package.
      spec: of the `config.json` in the folder.
      dtype: what the weights are cast to; None keeps each as it is stored.
      put: places one finished array on the device.
      progress: shows a bar on stderr.

    Returns:
      Our path -> array, one for every entry of the weight map.

    Raises:
      TensorFileError: the folder holds no model, or is damaged.
      CheckpointError: parameters are missing, unknown, of the wrong shape, or too large for
        `dtype`; lists every fault.
    """
    manifest = read_manifest(folder, kind="model")
    infos = read_infos(folder / WEIGHTS)
    stored = stored_entries(spec, infos)
    if problems := faults(stored, infos, kept=manifest.kept):
        raise CheckpointError(problems)
    copies_of = _copies(spec, stored)
    weights: dict[str, jax.Array] = {}
    total_bytes = sum(infos[name].size_bytes for name in stored)
    with byte_bar("loading weights", total_bytes, shown=progress) as advance:
        for name, array in read_arrays(folder / WEIGHTS, infos, stored):
            advance(array.nbytes)
            for path, finished in _finished(stored[name], array, copies_of, dtype):
                if not is_finite(finished):
                    problems.append(f"{path}: holds NaN, infinity, or too much for {dtype}")
                elif not problems:
                    weights[path] = jax.block_until_ready(put(finished))
    if problems:
        raise CheckpointError(problems)
    return weights


def stored_entries(spec: ModelSpec, infos: Mapping[str, TensorInfo]) -> dict[str, Entry]:
    """The entries that are stored: all but a copy, such as a tied head, that was not."""
    return {e.ours: e for e in spec.entries if e.stand_in is None or e.ours in infos}


def faults(
    stored: Mapping[str, Entry], infos: Mapping[str, TensorInfo], *, kept: Iterable[str]
) -> list[str]:
    """Every way in which the arrays differ from the entries and what else was kept."""
    found = infos.keys() - set(kept)
    problems = [f"missing from the checkpoint: {name}" for name in stored.keys() - found]
    problems += [f"in the checkpoint but not in the map: {name}" for name in found - stored.keys()]
    problems += [
        f"{name}: shape {infos[name].shape}, want {stored[name].shape}"
        for name in found & stored.keys()
        if infos[name].shape != stored[name].shape
    ]
    return problems


def _copies(spec: ModelSpec, stored: Mapping[str, Entry]) -> dict[str, list[Entry]]:
    """Our path of an original -> the entries that copy from it."""
    owner_of = {name: entry.ours for entry in stored.values() for name in entry.hf}
    copies: dict[str, list[Entry]] = {}
    for entry in spec.entries:
        if entry.ours not in stored and entry.stand_in is not None:
            copies.setdefault(owner_of[entry.stand_in], []).append(entry)
    return copies


def _finished(
    entry: Entry,
    array: np.ndarray,
    copies_of: Mapping[str, list[Entry]],
    dtype: DTypeLike | None,
) -> Iterator[tuple[str, np.ndarray]]:
    """A parameter and its copies, cast."""
    want = np.dtype(dtype or array.dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller reports it by name
        yield entry.ours, array.astype(want, copy=False)
        for copy in copies_of.get(entry.ours, ()):
            yield copy.ours, copy.join([entry.split(array)[str(copy.stand_in)]], want)
