"""Writes torch files byte by byte, both formats, so that tests can also write wrong ones."""

import dataclasses
import io
import struct
import zipfile

import numpy as np

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
STORAGE_OF = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int8": "CharStorage",
    "bool": "BoolStorage",
}
START, STOP = b"\x80\x02", b"."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A view of elements `data`, which are stored under `key`."""

    key: str
    data: np.ndarray
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    def value(self) -> np.ndarray:
        steps = [s * self.data.itemsize for s in self.strides]
        return np.lib.stride_tricks.as_strided(self.data[self.offset :], self.shape, steps)


def whole(key: str, array: np.ndarray) -> Tensor:
    strides = tuple(s // array.itemsize for s in array.strides)
    return Tensor(key=key, data=array.reshape(-1), shape=array.shape, strides=strides)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def sequence(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + item for key, item in items.items()) + b"u"


def storage(key: str, kind: str, elements: int, *, legacy: bool = False) -> bytes:
    view = [b"N"] if legacy else []
    parts = [text("storage"), name("torch", kind), text(key), text("cpu"), number(elements), *view]
    return sequence(*parts) + b"Q"


def tensor(item: Tensor, *, legacy: bool = False) -> bytes:
    kind = STORAGE_OF[item.data.dtype.name]
    hooks = name("collections", "OrderedDict") + b")R"
    arguments = sequence(
        storage(item.key, kind, item.data.size, legacy=legacy),
        number(item.offset),
        sequence(*map(number, item.shape)),
        sequence(*map(number, item.strides)),
        b"\x89",
        hooks,
    )
    return name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def archive(pickle: bytes, storages: dict[str, bytes], *, compression=zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        file.writestr("m/data.pkl", pickle)
        file.writestr("m/byteorder", "little")
        for key, raw in storages.items():
            file.writestr(f"m/data/{key}", raw)
    return out.getvalue()


def zip_bytes(tensors: dict[str, Tensor]) -> bytes:
    root = mapping(**{key: tensor(item) for key, item in tensors.items()})
    raw = {item.key: item.data.tobytes() for item in tensors.values()}
    return archive(START + root + STOP, raw)


def legacy_bytes(tensors: dict[str, Tensor]) -> bytes:
    root = mapping(**{key: tensor(item, legacy=True) for key, item in tensors.items()})
    data = {item.key: item.data for item in tensors.values()}
    keys = b"](" + b"".join(map(text, data)) + b"e"
    system = mapping(little_endian=b"\x88")
    pickles = [number(MAGIC), number(PROTOCOL), system, root, keys]
    raw = (struct.pack("<q", array.size) + array.tobytes() for array in data.values())
    return b"".join(START + part + STOP for part in pickles) + b"".join(raw)
