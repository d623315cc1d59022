"""Writes safetensors as Hugging Face does: one file, or shards of bounded size with an index."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

# transformers refuses a file whose header does not say so.
_METADATA = {"format": "pt"}


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file with the access rights of any new file."""
    path.touch()
    mode = path.stat().st_mode  # the library leaves a file that nobody but its owner may read
    save_file(dict(tensors), path, metadata=_METADATA)
    path.chmod(mode)


class ShardWriter:
    """Takes tensors one by one and holds those of one shard in memory.

    Nothing is complete before `finish`, which gives the files their names.
    """

    def __init__(self, folder: Path, *, max_shard_bytes: int):
        if max_shard_bytes <= 0:
            raise ValueError(f"a shard of {max_shard_bytes} bytes holds nothing; want more than 0")
        self._folder, self._max_shard_bytes = folder, max_shard_bytes
        self._open: dict[str, np.ndarray] = {}
        self._open_bytes = self._total_bytes = self._parameters = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, array: np.ndarray) -> None:
        """Takes the next tensor; one larger than a shard gets a shard of its own."""
        if self._open and self._open_bytes + array.nbytes > self._max_shard_bytes:
            self._flush()
        self._open[name] = np.require(array, requirements="C")  # keeps the shape () too
        self._open_bytes += array.nbytes
        self._total_bytes += array.nbytes
        self._parameters += array.size

    def finish(self) -> None:
        """Writes what is left, and the index if there are several shards."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self._folder / "model.safetensors")
            return
        weight_map = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05}-of-{count:05}.safetensors"
            self._part(i).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        metadata = {"total_parameters": self._parameters, "total_size": self._total_bytes}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        path = self._folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        save_tensors(self._part(len(self._shards)), self._open)
        self._shards.append(list(self._open))
        self._open, self._open_bytes = {}, 0

    def _part(self, i: int) -> Path:
        return self._folder / f"part-{i}.safetensors"
