"""Folders as wholes: written beside their place and renamed, and the files beside the tensors."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from valora_jax.checkpoint.folder import MANIFEST, WEIGHTS

# Files of weights, in any format; a conversion writes those it read anew and leaves the others.
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf"),
    *(".safetensors.index.json", ".bin.index.json", ".msgpack.index.json", ".h5.index.json"),
)
# What LLaVA's own code trained beside its LoRA; only torch reads and writes it, so it goes along.
_KEPT = ("non_lora_trainables.bin",)


@contextlib.contextmanager
def new_folder(place: Path, *, sources: tuple[Path, ...], overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder that becomes `place` when the block ends well, and goes if not.

    Raises:
      ValueError: `place` is not empty and `overwrite` is False, or it is, holds or lies in a
        source.
    """
    place = place.absolute()
    _check_place(place, sources, overwrite)
    place.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, since a rename does not leave a file system.
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as work:
        built = Path(work) / "new"
        built.mkdir()
        yield built
        if place.exists():
            place.rename(Path(work) / "old")
        built.rename(place)


def _check_place(place: Path, sources: tuple[Path, ...], overwrite: bool) -> None:
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise ValueError(f"{place} is no folder; name another place")
    for source in sources:
        inner, outer = place.resolve(), source.resolve()
        if inner == outer or inner in outer.parents or outer in inner.parents:
            raise ValueError(f"{place} is, holds or lies in the source {source}; name another")
    if not overwrite and place.is_dir() and any(place.iterdir()):
        raise ValueError(f"{place} is not empty; name another place, or pass --overwrite")


def side_files(folder: Path) -> list[Path]:
    """Every file that holds no weights, by its path in `folder`; hidden folders are left out."""
    found = []
    for where, inside, names in os.walk(folder):
        parts = Path(where).relative_to(folder)
        inside[:] = sorted(n for n in inside if n[0] != "." and parts / n != Path(WEIGHTS))
        found += [
            parts / name
            for name in sorted(names)
            if (not name.endswith(_WEIGHT_SUFFIXES) or name in _KEPT) and name != MANIFEST
        ]
    return found


def copy_side_files(source: Path, target: Path) -> None:
    """Copies `side_files`, byte for byte."""
    for path in side_files(source):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)
