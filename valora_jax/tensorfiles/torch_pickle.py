"""Reads the pickles of torch files as data: nothing is imported, constructed or called.

A stack machine over the few pickle opcodes that describe dicts, lists, tuples, numbers and text.
The only globals it admits are the names of torch's tensor rebuilders, storages and dtypes, and
they stand for the descriptions below. Any other global or opcode is refused by name.
"""

import dataclasses
import io
import math
import mmap
import pickletools
from collections.abc import Sequence
from typing import IO, cast

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """A run of elements elsewhere in the file."""

    key: str
    dtype: np.dtype
    elements: int

    @property
    def size_bytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """A tensor: offset and strides count elements of `dtype` in the storage."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self):
        counts = (self.offset, *self.shape, *self.strides)
        if any(type(n) is not int or n < 0 for n in counts) or len(self.shape) != len(self.strides):
            raise ValueError("a tensor has a shape, stride or offset that is no count")
        if len(self.shape) > 64:
            raise ValueError(f"a tensor has {len(self.shape)} dimensions, numpy holds 64")
        room = self.storage.size_bytes // self.dtype.itemsize
        spans = ((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        last = self.offset + sum(spans)
        size = math.prod(self.shape)
        # The second test refuses expanded tensors (stride 0), whose copy could be of any size.
        if size and (last >= room or size > room):
            raise ValueError(
                f"a tensor of shape {self.shape}, strides {self.strides}, offset {self.offset} "
                f"does not fit its storage of {room} elements"
            )


_NUMPY_OF_TORCH = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
}
_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "UntypedStorage": np.uint8,
}


class _State(dict):
    """A state dict's OrderedDict; its attributes (`_metadata`: module versions) are dropped."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Rebuilder:
    """One of torch's functions, by name: reducing it yields a description."""

    name: str


_ADMITTED: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _Rebuilder("OrderedDict"),
    ("torch._utils", "_rebuild_tensor"): _Rebuilder("tensor"),
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuilder("tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"): _Rebuilder("tensor_v3"),
    ("torch._utils", "_rebuild_parameter"): _Rebuilder("parameter"),
    **{("torch", name): np.dtype(kind) for name, kind in _NUMPY_OF_TORCH.items()},
    **{("torch", name): np.dtype(kind) for name, kind in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): np.dtype(np.uint8),
}
_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class PickleReader:
    """Reads consecutive pickles of one file; `storages` collects what they refer to."""

    def __init__(self):
        self.storages: dict[str, Storage] = {}

    def read(self, stream: io.BytesIO | mmap.mmap) -> object:
        """Reads one pickle and leaves the stream behind it.

        Args:
          stream: of a kind whose `read(n)` allocates no more than is left, whatever `n` a pickle
            claims. A buffered file would allocate `n`.

        Returns:
          dicts, lists, tuples, numbers, text and `View`s.

        Raises:
          ValueError: the pickle is damaged, or does more than describe tensors.
        """
        machine = _Machine(self.storages)
        try:
            for opcode, argument, _ in pickletools.genops(cast("IO[bytes]", stream)):
                if opcode.name == "STOP":
                    return machine.stack.pop()
                machine.step(opcode.name, argument)
        # What a malformed stream does to the machine: pops of nothing, items of the wrong type.
        except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"damaged pickle: {error!r}") from error
        raise ValueError("damaged pickle: it does not end")


class _Machine:
    def __init__(self, storages: dict[str, Storage]):
        self.stack: list = []
        self._storages = storages
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}

    def step(self, opcode: str, argument) -> None:
        stack = self.stack
        if opcode in _PUSHED:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _TUPLES:
            self._reduce_top(_TUPLES[opcode], tuple)
        elif opcode in ("PROTO", "FRAME"):
            pass
        elif opcode in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif opcode == "MARK":
            self._marks.append(len(stack))
        elif opcode == "POP":
            stack.pop()
        else:
            self._compound(opcode, argument)

    def _compound(self, opcode: str, argument) -> None:
        stack = self.stack
        match opcode:
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "LIST":
                stack.append(self._pop_to_mark())
            case "DICT":
                items = self._pop_to_mark()
                stack.append({})
                _set_items(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = self._pop_to_mark()
                _set_items(stack[-1], items)
            case "APPEND":
                item = stack.pop()
                _list(stack[-1]).append(item)
            case "APPENDS":
                items = self._pop_to_mark()
                _list(stack[-1]).extend(items)
            case "GLOBAL":
                stack.append(_admitted(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_admitted(module, name))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                arguments, callee = stack.pop(), stack.pop()
                stack.append(_rebuild(callee, arguments))
            case "BUILD":
                stack.pop()
                if not isinstance(stack[-1], _State):
                    raise ValueError("it sets the state of an object that is no OrderedDict")
            case _:
                raise ValueError(f"opcode {opcode} is not part of a plain tensor file")

    def _pop_to_mark(self) -> list:
        start = self._marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _reduce_top(self, count: int, kind: type) -> None:
        if len(self.stack) < count:
            raise ValueError("damaged pickle: too few items for a tuple")
        items = self.stack[-count:]
        del self.stack[-count:]
        self.stack.append(kind(items))

    def _storage(self, persistent_id: Sequence) -> Storage:
        tag, dtype, key, _device, elements, *view = persistent_id
        if tag != "storage" or not isinstance(dtype, np.dtype) or any(v is not None for v in view):
            raise ValueError("it refers to something that is not a whole storage")
        if not isinstance(key, str) or type(elements) is not int or elements < 0:
            raise ValueError("a storage has no name or no size")
        storage = Storage(key=key, dtype=dtype, elements=elements)
        known = self._storages.setdefault(key, storage)
        if known.size_bytes < storage.size_bytes:
            self._storages[key] = storage
        return storage


def _set_items(target: dict, items: Sequence) -> None:
    if not isinstance(target, dict):
        raise ValueError("damaged pickle: it sets an item of something that is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Only text and numbers: hashing a tuple nested a million deep would overflow the C stack.
        if not isinstance(key, str | int):
            raise ValueError("a dict has a key that is neither text nor a number")
        target[key] = value


def _list(target) -> list:
    if not isinstance(target, list):
        raise ValueError("damaged pickle: it appends to something that is no list")
    return target


def _admitted(module: str, name: str) -> object:
    known = _ADMITTED.get((module, name))
    if known is None:
        raise ValueError(
            f"it refers to {module}.{name}, which is not part of a plain tensor file; "
            "nothing in it was run"
        )
    return known


def _rebuild(callee, arguments: Sequence) -> object:
    """What calling one of torch's rebuilders with these arguments would describe."""
    if not isinstance(callee, _Rebuilder) or not isinstance(arguments, tuple):
        raise ValueError("it calls something that is no function")
    match callee.name:
        case "OrderedDict":
            # Lists can hold one list many times: two loops here would be a bomb of n * n items.
            pairs = arguments[0] if arguments else []
            state = _State()
            for key, value in pairs:
                _set_items(state, [key, value])
            return state
        case "parameter":
            view = arguments[0]
            if not isinstance(view, View):
                raise ValueError("a parameter holds no tensor")
            return view
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    dtype = arguments[6] if callee.name == "tensor_v3" else storage.dtype
    if not isinstance(dtype, np.dtype):
        raise ValueError("a tensor has no dtype")
    return View(
        storage=storage, dtype=dtype, offset=offset, shape=tuple(shape), strides=tuple(strides)
    )
