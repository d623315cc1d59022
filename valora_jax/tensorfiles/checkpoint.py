"""A folder of tensors, in one file or in shards with an index, read shard by shard.

Opening reads every header and checks that the index and the shards agree; no file stays open.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from valora_jax.errors import TensorFileError
from valora_jax.tensorfiles.interface import TensorFile, TensorInfo
from valora_jax.tensorfiles.opening import open_tensors

# In the order Hugging Face looks for them.
MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


class Checkpoint:
    """The tensors of a folder: what there is, and in which shard.

    `infos` has shape and dtype by name, `shard_of` the file by name, `shards` all files in order.
    """

    def __init__(self, folder: Path, shards: Mapping[Path, Mapping[str, TensorInfo]]):
        self.folder = folder
        self.shards = tuple(shards)
        self.infos = {name: info for infos in shards.values() for name, info in infos.items()}
        self.shard_of = {name: path for path, infos in shards.items() for name in infos}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.infos)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.infos[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self.infos[name].dtype

    @property
    def size_bytes(self) -> int:
        return sum(info.size_bytes for info in self.infos.values())

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor; opens its shard each time, so use `stream` for many."""
        with open_tensors(self.shard_of[name]) as shard:
            return shard.read(name)

    def stream(self) -> Iterator[TensorFile]:
        """Opens one shard after the other and closes each before the next."""
        for path in self.shards:
            with open_tensors(path) as shard:
                yield shard


def open_checkpoint(
    folder: str | os.PathLike[str], *, files: tuple[str, ...] = MODEL_FILES
) -> Checkpoint:
    """Finds the tensors of a Hugging Face folder and checks that they are whole.

    Args:
      folder: holds one of `files`; the first one found counts.
      files: names of tensor files, or of indexes (`….index.json`) of shards beside them.

    Raises:
      TensorFileError: nothing is found, a file is damaged, a shard is missing, or the index and
        the shards disagree on which tensor lies where (all such faults are listed).
    """
    folder = Path(folder)
    found = next((folder / name for name in files if (folder / name).is_file()), None)
    if found is None:
        raise TensorFileError(folder, f"no such folder, or none of {', '.join(files)} in it")
    if found.suffix == ".json":
        return Checkpoint(folder, _indexed_shards(found))
    return Checkpoint(folder, {found: _infos(found)})


def _infos(path: Path) -> dict[str, TensorInfo]:
    with open_tensors(path) as file:
        return file.infos


def _indexed_shards(index: Path) -> dict[Path, dict[str, TensorInfo]]:
    shard_of = _weight_map(index)
    faults, shards = [], {}
    for shard in sorted(set(shard_of.values())):
        path = index.parent / shard
        # A name with a path in it could point anywhere on the machine.
        if Path(shard).name != shard or not path.is_file():
            faults.append(f"shard {shard!r} is missing")
            continue
        shards[path] = infos = _infos(path)
        named = {name for name, place in shard_of.items() if place == shard}
        faults += [f"{name} is not in {shard}" for name in sorted(named - infos.keys())]
        faults += [
            f"{shard} holds {name}, which the index places in {shard_of.get(name, 'no shard')}"
            for name in sorted(infos.keys() - named)
        ]
    if faults:
        raise TensorFileError(index, "the index and the shards disagree:", *faults)
    return shards


def _weight_map(index: Path) -> dict[str, str]:
    try:
        shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TensorFileError(index, f"not an index of shards: {error!r}") from error
    if not isinstance(shard_of, dict) or not all(isinstance(s, str) for s in shard_of.values()):
        raise TensorFileError(index, "weight_map is not an object of tensor name -> file name")
    if not shard_of:
        raise TensorFileError(index, "weight_map is empty")
    return shard_of
