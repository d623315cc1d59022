"""Weight maps: a table of entries that reads a checkpoint into our names and writes it back.

An `Entry` names one parameter of ours and the tensors of the checkpoint that it is made of, with
their shapes. "as_is" keeps `[out, ...]`; "transposed" turns `[out, *in]` into `[in, out]` with the
trailing axes flattened, so that a convolution over patches is a matmul. Several tensors are joined
along the output axis (q|k|v, gate|up). Both directions are exact: no bit changes unless the dtype
does. Names here are canonical; a family's `names` module maps what files say onto them.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

type Shape = tuple[int, ...]

# A strided copy of whole matrices misses the cache on every element; 128 rows at a time ran 3 to 5
# times as fast as one big assignment (45M elements, float16 and bfloat16).
_BLOCK_ROWS = 128


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One parameter of ours and where it comes from.

    Attributes:
      hf: canonical tensor name -> its shape in the checkpoint, in the order of the join. "{i}"
        stands for a layer number until `for_each_layer` fills it in.
      ours: dotted path in the model, with the same placeholder.
      layout: how the checkpoint's axes become ours; see the module docstring.
      stand_in: the tensor to copy when the checkpoint has no `hf` of its own (a tied head). It
        belongs to another entry, so writing back leaves `hf` out where the two are equal.
    """

    hf: Mapping[str, Shape]
    ours: str
    layout: Literal["as_is", "transposed"] = "as_is"
    stand_in: str | None = None

    @property
    def shape(self) -> Shape:
        """The shape of the parameter in our layout."""
        rows, tail = sum(shape[0] for shape in self.hf.values()), next(iter(self.hf.values()))[1:]
        return (math.prod(tail), rows) if self.layout == "transposed" else (rows, *tail)

    def join(self, parts: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
        """Lays `parts`, in the order of `hf`, out as our parameter: a new array of `dtype`."""
        out = _aligned_empty(self.shape, dtype)
        stops = list(itertools.accumulate(part.shape[0] for part in parts))
        for part, stop in zip(parts, stops, strict=True):
            columns = slice(stop - part.shape[0], stop)
            if self.layout == "transposed":
                _copy_transposed(part.reshape(part.shape[0], -1), out[:, columns])
            else:
                out[columns] = part
        return out

    def split(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """The inverse of `join`: new arrays under the checkpoint's names and shapes."""
        parts, start = {}, 0
        for name, shape in self.hf.items():
            part, stop = np.empty(shape, array.dtype), start + shape[0]
            if self.layout == "transposed":
                _copy_transposed(array[:, start:stop], part.reshape(shape[0], -1))
            else:
                part[...] = array[start:stop]
            parts[name], start = part, stop
        return parts


def for_each_layer(layers: int, entries: Iterable[Entry]) -> list[Entry]:
    """Repeats `entries` for every layer, with "{i}" replaced by its number."""
    entries = list(entries)
    return [
        dataclasses.replace(
            entry,
            hf={name.format(i=i): shape for name, shape in entry.hf.items()},
            ours=entry.ours.format(i=i),
        )
        for i in range(layers)
        for entry in entries
    ]


def resolve(entries: Iterable[Entry], names: Iterable[str]) -> list[Entry]:
    """Replaces what a checkpoint with these `names` lacks by its stand-in."""
    names = set(names)
    return [
        entry
        if entry.stand_in is None or entry.hf.keys() <= names
        else dataclasses.replace(entry, hf={entry.stand_in: next(iter(entry.hf.values()))})
        for entry in entries
    ]


def mismatches(entries: Iterable[Entry], shapes: Mapping[str, Shape]) -> list[str]:
    """Every way in which a checkpoint with these tensors differs from the table, one a line."""
    wanted = {name: (entry, shape) for entry in entries for name, shape in entry.hf.items()}
    problems = [f"missing from the checkpoint: {name}" for name in wanted.keys() - shapes.keys()]
    for name, shape in shapes.items():
        if name not in wanted:
            problems.append(f"in the checkpoint but not in the map: {name}")
        elif tuple(shape) != wanted[name][1]:
            entry, want = wanted[name]
            problems.append(f"{name} -> {entry.ours}: shape {tuple(shape)}, want {want}")
    return problems


def to_hf(
    entries: Sequence[Entry], ours: Mapping[str, ArrayLike]
) -> Iterator[tuple[str, np.ndarray]]:
    """Gives the checkpoint's tensors back one by one: canonical names, bit for bit.

    Args:
      entries: the table that `ours` was read with.
      ours: our path -> array in our layout, on the host or a device. One parameter at a time is
        copied to the host, so a writer that goes shard by shard stays small.
    """
    owner_of = {name: entry for entry in entries for name in entry.hf}
    for entry in entries:
        parts = entry.split(np.asarray(ours[entry.ours]))
        if entry.stand_in is not None:
            owner = owner_of[entry.stand_in]
            twin = owner.split(np.asarray(ours[owner.ours]))[entry.stand_in]
            if all(_same_bits(part, twin) for part in parts.values()):
                continue
        yield from parts.items()


def is_finite(array: np.ndarray) -> bool:
    """Whether a float array, of ml_dtypes' kinds too, holds neither NaN nor infinity."""
    # All exponent bits set means NaN or infinity; on 16-bit types the test of bits ran 4 times as
    # fast as np.isfinite. Block by block, so that the temporaries stay in the cache.
    unsigned = np.dtype(f"u{array.dtype.itemsize}")
    exponent = np.array(np.inf, array.dtype).view(unsigned)
    bits = array.view(unsigned)
    blocks = (bits[i : i + _BLOCK_ROWS] for i in range(0, len(bits), _BLOCK_ROWS))
    return not any(((block & exponent) == exponent).any() for block in blocks)


def _aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Memory that jax's CPU device takes over as it is; it copies what is not 64-byte aligned."""
    size_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(size_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size_bytes].view(dtype).reshape(shape)


def _copy_transposed(source: np.ndarray, target: np.ndarray) -> None:
    """Writes `source.T` into `target` (strided views both), casting on the way."""
    for start in range(0, source.shape[0], _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        target[:, rows] = source[rows].astype(target.dtype).T


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()
