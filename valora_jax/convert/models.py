"""Model folders: Hugging Face -> Orbax -> Hugging Face, every tensor bit for bit.

The way there keeps finished parameters in a file that is mapped into memory, and Orbax writes from
the map: beside the kernel's file cache the host holds one parameter (0.6 GB in all for a model of
4.1 GB), and the disk holds the model a second time until the end. The way back holds one shard of
the output and 0.6 GB.
"""

import contextlib
import mmap
import tempfile
from pathlib import Path

import numpy as np

from valora_jax.checkpoint.arrays import read_arrays, read_infos
from valora_jax.checkpoint.folder import WEIGHTS, Manifest, read_manifest, write_orbax
from valora_jax.checkpoint.loading import faults, stored_entries
from valora_jax.convert.folders import copy_side_files, new_folder
from valora_jax.convert.shards import ShardWriter
from valora_jax.errors import CheckpointError
from valora_jax.models import read_spec
from valora_jax.models.loading import load_weights, read_config
from valora_jax.models.progress import byte_bar
from valora_jax.tensorfiles import open_checkpoint

MAX_SHARD_BYTES = 5_000_000_000


def hf_to_orbax(source: Path, target: Path, *, overwrite: bool, progress: bool) -> None:
    """Writes the model in `source` as an Orbax folder, in our layout and the stored dtypes.

    Raises:
      ValueError: `target` cannot be written to.
      TensorFileError, CheckpointError, NotImplementedError: `source` is no whole checkpoint of a
        model that is known here; parts of one parameter, such as q, k and v, must share a dtype.
    """
    spec = read_spec(read_config(source))
    checkpoint = open_checkpoint(source)
    kept = tuple(name for name in checkpoint.names if name.endswith(spec.ignored_names))
    tensors = tuple(name for name in checkpoint.names if name not in kept)
    known = {spec.canonical_name(name) for name in tensors}
    with (
        new_folder(target, sources=(source,), overwrite=overwrite) as built,
        _MappedFile(built.parent, checkpoint.size_bytes, arrays=len(spec.entries)) as mapped,
    ):
        weights = load_weights(
            source,
            # A tied head is made again when it is loaded.
            [e for e in spec.entries if e.stand_in is None or e.hf.keys() <= known],
            canonical=spec.canonical_name,
            ignored=spec.ignored_names,
            dtype=None,
            put=mapped.put,  # pyright: ignore[reportArgumentType]
            progress=progress,
        )
        buffers = {name: checkpoint.read(name) for name in kept}
        copy_side_files(source, built)
        write_orbax(
            built, Manifest(kind="model", tensors=tensors, kept=kept), {**weights, **buffers}
        )


def orbax_to_hf(
    source: Path,
    target: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool,
    progress: bool,
) -> None:
    """Writes an Orbax folder as the Hugging Face folder it was made of.

    Tensors have their old names, bits and dtypes; they are spread over shards anew.

    Raises:
      ValueError: `target` cannot be written to.
      TensorFileError, CheckpointError: `source` is no Orbax folder of a model, or is damaged.
    """
    manifest = read_manifest(source, kind="model")
    spec = read_spec(read_config(source))
    infos = read_infos(source / WEIGHTS)
    name_of = {spec.canonical_name(name): name for name in manifest.tensors}
    entries = stored_entries(spec, infos)
    wanted = {name for entry in entries.values() for name in entry.hf}
    problems = faults(entries, infos, kept=manifest.kept)
    problems += [f"missing from the checkpoint: {n}" for n in set(manifest.kept) - infos.keys()]
    problems += [f"the manifest lacks {name}" for name in wanted - name_of.keys()]
    problems += [f"not stored: {name_of[name]}" for name in name_of.keys() - wanted]
    if problems:
        raise CheckpointError(problems)
    with new_folder(target, sources=(source,), overwrite=overwrite) as built:
        writer = ShardWriter(built, max_shard_bytes=max_shard_bytes)
        total_bytes = sum(info.size_bytes for info in infos.values())
        with byte_bar("writing weights", total_bytes, shown=progress) as advance:
            names = (*entries, *manifest.kept)
            for name, array in read_arrays(source / WEIGHTS, infos, names):
                if name in entries:
                    for part, values in entries[name].split(array).items():
                        writer.add(name_of[part], values)
                else:
                    writer.add(name, array)
                advance(array.nbytes)
        writer.finish()
        copy_side_files(source, built)


class _MappedFile(contextlib.AbstractContextManager):
    """A nameless file in a folder, as memory: arrays put there can leave the host's memory."""

    def __init__(self, folder: Path, size_bytes: int, *, arrays: int):
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed in __exit__)
        # Each array may waste up to an alignment.
        self._file.truncate(size_bytes + (arrays + 1) * mmap.PAGESIZE)
        self._bytes = np.memmap(self._file, np.uint8, "r+")
        self._used_bytes = 0

    def put(self, array: np.ndarray) -> np.ndarray:
        """Copies an array into the file; the view lives as long as the file is mapped."""
        start, stop = self._used_bytes, self._used_bytes + array.nbytes
        view = np.asarray(self._bytes[start:stop]).view(array.dtype).reshape(array.shape)
        view[...] = array
        self._used_bytes = stop + -stop % mmap.PAGESIZE
        return view

    def __exit__(self, *exception: object) -> None:
        self._file.close()
