"""Torch's `.bin`, `.pt` and `.pth` files: zip archives and the older sequence of pickles.

The file is mapped, its pickle is read by `torch_pickle` (which runs nothing), and tensors are
copied out of the storages' bytes. Only a flat dict of name -> tensor is read.
"""

import io
import mmap
import struct
import zipfile
from pathlib import Path

import numpy as np

from valora_jax.errors import TensorFileError
from valora_jax.tensorfiles.interface import TensorFile, TensorInfo
from valora_jax.tensorfiles.torch_pickle import PickleReader, Storage, View

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ZIP_LOCAL_HEADER_BYTES = 30
_ZIP_END_BYTES = 22
# What mmap, zipfile and struct raise on damaged files, and the refusals of this module.
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    NotImplementedError,
    zipfile.BadZipFile,
    struct.error,
)


class TorchFile(TensorFile):
    def __init__(self, path: Path):
        """Maps the file and reads what it holds.

        Raises:
          TensorFileError: the file is damaged, of another kind, or its pickle does anything but
            describe a flat dict of tensors.
        """
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                try:
                    is_zip = self._map[:4] == b"PK\x03\x04"
                    root, starts = _read_zip(file, self._map) if is_zip else _read_old(self._map)
                    self._views = _flat(root)
                except _UNREADABLE:
                    self._map.close()
                    raise
        except _UNREADABLE as error:
            raise TensorFileError(path, f"not a readable torch file: {error}") from error
        self._starts = starts
        infos = {n: TensorInfo(shape=v.shape, dtype=v.dtype) for n, v in self._views.items()}
        super().__init__(path, infos, metadata=None)

    def read(self, name: str) -> np.ndarray:
        view = self._views[name]
        start = self._starts[view.storage.key] + view.offset * view.dtype.itemsize
        strides = [stride * view.dtype.itemsize for stride in view.strides]
        mapped = np.ndarray(view.shape, view.dtype, self._map, start, strides)
        return mapped.copy(order="C")

    def close(self) -> None:
        self._map.close()


def _flat(root: object) -> dict[str, View]:
    if not isinstance(root, dict):
        raise ValueError(f"it holds a {type(root).__name__}, want a dict of tensors")
    odd = [f"{k!r:.80}: {type(v).__name__}" for k, v in root.items() if not isinstance(v, View)]
    odd += [f"{k!r:.80}" for k in root if not isinstance(k, str)]
    if odd:
        raise ValueError(f"some entries are not named tensors: {', '.join(odd[:5])}")
    return root


def _read_zip(file: io.BufferedReader, mapped: mmap.mmap) -> tuple[object, dict[str, int]]:
    """The object of a zip archive, and where in the file each storage starts."""
    # zipfile ignores what follows the archive; torch writes no comment, so the file ends with it.
    if mapped[-_ZIP_END_BYTES : -_ZIP_END_BYTES + 4] != b"PK\x05\x06":
        raise ValueError("the archive is cut short or followed by other bytes")
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"the archive holds {len(pickles)} files data.pkl, want 1")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in entries:
        start, size = _extent(entries[f"{folder}byteorder"], mapped)
        if mapped[start : start + size] != b"little":
            raise ValueError("its numbers are not little-endian")
    start, size = _extent(entries[pickles[0]], mapped)
    reader = PickleReader()
    root = reader.read(io.BytesIO(mapped[start : start + size]))
    starts = {}
    for key, storage in reader.storages.items():
        if (entry := entries.get(f"{folder}data/{key}")) is None:
            raise ValueError(f"the archive lacks storage {key!r:.80}")
        starts[key], size = _extent(entry, mapped)
        _check_room(storage, size)
    return root, starts


def _extent(entry: zipfile.ZipInfo, mapped: mmap.mmap) -> tuple[int, int]:
    """Start and size in bytes of an archive member, which torch stores as it is."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise ValueError(f"archive member {entry.filename!r:.80} is compressed or encrypted")
    header = mapped[entry.header_offset : entry.header_offset + _ZIP_LOCAL_HEADER_BYTES]
    if len(header) < _ZIP_LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise ValueError(f"archive member {entry.filename!r:.80} is not where it should be")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    start = entry.header_offset + _ZIP_LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    if start + entry.file_size > len(mapped):
        raise ValueError(f"archive member {entry.filename!r:.80} reaches past the end of the file")
    return start, entry.file_size


def _check_room(storage: Storage, size_bytes: int) -> None:
    if storage.size_bytes > size_bytes:
        raise ValueError(
            f"storage {storage.key!r:.80} claims {storage.size_bytes} bytes, has {size_bytes}"
        )


def _read_old(mapped: mmap.mmap) -> tuple[object, dict[str, int]]:
    """The object of a file older than torch 1.6: five pickles, then the storages in a row."""
    reader = PickleReader()
    if reader.read(mapped) != _LEGACY_MAGIC or reader.read(mapped) != _LEGACY_PROTOCOL:
        raise ValueError("it is neither a torch archive nor torch's older format")
    system = reader.read(mapped)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    root, keys = reader.read(mapped), reader.read(mapped)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("its list of storages is not a list of names")
    if sorted(keys) != sorted(reader.storages):
        raise ValueError("its list of storages disagrees with its tensors")
    starts, position = {}, mapped.tell()
    for key in keys:
        storage = reader.storages[key]
        (elements,) = struct.unpack("<q", mapped[position : position + 8])
        starts[key] = position + 8
        if elements != storage.elements:
            raise ValueError(
                f"storage {key!r:.80} has {elements} elements, {storage.elements} used"
            )
        position = starts[key] + storage.size_bytes
        if position > len(mapped):
            raise ValueError(f"storage {key!r:.80} reaches past the end of the file")
    if position != len(mapped):
        raise ValueError(f"{len(mapped) - position} bytes follow the last storage")
    return root, starts
