"""The folder around an Orbax checkpoint: its manifest, and where the arrays lie."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from valora_jax.checkpoint.arrays import save_arrays
from valora_jax.errors import TensorFileError

MANIFEST = "valora_orbax.json"
WEIGHTS = "orbax_weights"
_VERSION = 1  # of the manifest and of what the arrays mean


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What an Orbax folder holds.

    Attributes:
      kind: whether the arrays are a model's parameters under our paths, or an adapter's tensors.
      tensors: names in the source, in its spelling; of an adapter the names of the arrays too.
      kept: arrays that are no parameters, such as buffers of old files, under their own names.
    """

    kind: Literal["model", "adapter"]
    tensors: tuple[str, ...]
    kept: tuple[str, ...] = ()


def is_orbax(folder: Path) -> bool:
    """Whether `folder` was written by `write_orbax`."""
    return (folder / MANIFEST).is_file()


def write_orbax(
    folder: Path, manifest: Manifest, arrays: Mapping[str, np.ndarray | jax.Array]
) -> None:
    """Writes arrays and manifest into an existing folder, beside its side files.

    Raises:
      ValueError, OSError: as `arrays.save_arrays`.
    """
    save_arrays(folder / WEIGHTS, arrays)
    content = {"version": _VERSION, **dataclasses.asdict(manifest)}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path, *, kind: Literal["model", "adapter"] | None = None) -> Manifest:
    """Reads what an Orbax folder holds.

    Raises:
      TensorFileError: it is no such folder, damaged, of a newer version, or not of `kind`.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise TensorFileError(folder, f"no Orbax folder: it has no {MANIFEST}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"]
        manifest = Manifest(
            kind=content["kind"], tensors=tuple(content["tensors"]), kept=tuple(content["kept"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise TensorFileError(path, f"damaged: {error!r}") from error
    if version != _VERSION:
        raise TensorFileError(path, f"version {version!r}, this program reads {_VERSION}")
    if kind is not None and manifest.kind != kind:
        raise TensorFileError(folder, f"holds an Orbax {manifest.kind}, want one of a {kind}")
    return manifest
