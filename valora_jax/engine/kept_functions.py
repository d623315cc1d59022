"""Compiled functions kept between starts, so that the next start does not even trace them.

jax's own cache of compilations is asked for lowered functions: for a 7B model, tracing and lowering
took most of a start from it. A function is found here by what it is traced from: its name, its
shape, and its arguments' shapes. That is all that tells functions of one origin apart, the same
sources, versions, settings and device; a file of another origin is written over.
"""

import contextlib
import hashlib
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

_log = logging.getLogger(__name__)

_PACKAGES = ("pallas_kernels", "valora_jax")
_VERSIONS = ("flax", "jax", "jaxlib")


class KeptFunctions:
    """A folder of compiled functions. As they are unpickled, nobody else may write there."""

    def __init__(self, folder: Path):
        self._folder, self._origin = folder, _origin()

    @classmethod
    def on_this_device(cls, folder: Path | None) -> "KeptFunctions | None":
        """None without a folder, and on a CPU: what is compiled for one may not run on the next,
        and its few steps trace quickly."""
        if folder is None or jax.default_backend() == "cpu":
            return None
        return cls(folder.expanduser() / "functions")

    def path_of(self, function: Callable, shape: Hashable, arguments: Mapping[str, Any]) -> Path:
        """Where a function is kept, or would be; `shape` says by its repr all that it is."""
        leaves, tree = jax.tree.flatten(arguments)
        arrays = [(leaf.shape, leaf.dtype) for leaf in leaves]
        key = repr((function.__module__, function.__qualname__, shape, arrays, tree))
        return self._folder / hashlib.sha256(key.encode()).hexdigest()

    def load(self, path: Path, arguments: Mapping[str, Any]) -> jax.stages.Compiled | None:
        """Returns a function for the first device, or None if it is not kept."""
        try:
            with path.open("rb") as file:
                if pickle.load(file) != self._origin:
                    return None
                program, results = pickle.load(file)
            trees = jax.tree.structure(((), arguments)), results
            devices = jax.devices()[:1]
            return serialize_executable.deserialize_and_load(
                program, *trees, execution_devices=devices
            )
        except FileNotFoundError:
            return None
        except (OSError, EOFError, pickle.UnpicklingError, jax.errors.JaxRuntimeError) as error:
            _log.warning("%s is compiled anew: %s", path, error)
            return None

    def save(self, path: Path, compiled: jax.stages.Compiled) -> None:
        """Keeps what was compiled inside `compiling`, if that can be written."""
        try:
            program, _, results = serialize_executable.serialize(compiled)
            self._folder.mkdir(parents=True, exist_ok=True)
            # Whole or not at all, whoever else starts or ends meanwhile.
            with tempfile.TemporaryDirectory(dir=self._folder) as work:
                part = Path(work) / path.name
                part.write_bytes(pickle.dumps(self._origin) + pickle.dumps((program, results)))
                part.replace(path)
        except (OSError, jax.errors.JaxRuntimeError) as error:
            _log.warning("%s is not kept for the next start: %s", path, error)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Keeps jax's cache out of it: what comes out of that may not load in another process."""
        was_enabled = jax.config.jax_enable_compilation_cache
        _enable_compilation_cache(False)
        try:
            yield
        finally:
            _enable_compilation_cache(was_enabled)


def _enable_compilation_cache(enable: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", enable)
    compilation_cache.reset_cache()  # or jax keeps what it decided at first


def _origin() -> str:
    """A digest of all that decides how functions are traced and compiled."""
    device = jax.devices()[0]
    settings = (
        [metadata.version(name) for name in _VERSIONS],
        device.client.platform_version,
        device.device_kind,
        sorted(jax.config.values.items()),
        os.environ.get("XLA_FLAGS"),
    )
    digest = hashlib.sha256(repr(settings).encode())
    root = Path(__file__).parents[2]
    for path in sorted(path for name in _PACKAGES for path in (root / name).rglob("*")):
        if path.suffix in (".py", ".json"):  # tables of tiles are sources, too
            digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
