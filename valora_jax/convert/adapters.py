"""Adapter folders: PEFT -> Orbax -> PEFT, every tensor bit for bit."""

from pathlib import Path

from valora_jax.checkpoint.arrays import read_arrays, read_infos
from valora_jax.checkpoint.folder import WEIGHTS, Manifest, read_manifest, write_orbax
from valora_jax.convert.folders import copy_side_files, new_folder
from valora_jax.convert.shards import save_tensors
from valora_jax.errors import AdapterError, CheckpointError
from valora_jax.tensorfiles import ADAPTER_FILES, open_checkpoint

_CONFIG = "adapter_config.json"


def peft_to_orbax(source: Path, target: Path, *, overwrite: bool) -> None:
    """Writes an adapter folder of any PEFT type as an Orbax folder, under its own tensor names.

    Raises:
      ValueError: `target` cannot be written to.
      AdapterError, TensorFileError: `source` is no adapter folder, or is damaged.
    """
    if not (source / _CONFIG).is_file():
        raise AdapterError(source.name, [f"{source / _CONFIG}: no such file"])
    checkpoint = open_checkpoint(source, files=ADAPTER_FILES)
    tensors = {name: file.read(name) for file in checkpoint.stream() for name in file.names}
    with new_folder(target, sources=(source,), overwrite=overwrite) as built:
        copy_side_files(source, built)
        write_orbax(built, Manifest(kind="adapter", tensors=tuple(tensors)), tensors)


def orbax_to_peft(source: Path, target: Path, *, overwrite: bool) -> None:
    """Writes an Orbax folder as the adapter folder it was made of; a `.bin` becomes safetensors.

    Raises:
      ValueError: `target` cannot be written to.
      TensorFileError, CheckpointError: `source` is no Orbax folder of an adapter, or is damaged.
    """
    manifest = read_manifest(source, kind="adapter")
    infos = read_infos(source / WEIGHTS)
    if missing := sorted(set(manifest.tensors) - infos.keys()):
        raise CheckpointError([f"missing from the checkpoint: {name}" for name in missing])
    tensors = dict(read_arrays(source / WEIGHTS, infos, manifest.tensors))
    with new_folder(target, sources=(source,), overwrite=overwrite) as built:
        save_tensors(built / "adapter_model.safetensors", tensors)
        copy_side_files(source, built)
