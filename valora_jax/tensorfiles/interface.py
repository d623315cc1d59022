"""What every kind of tensor file offers: names, shapes and dtypes at once, data when asked for."""

import abc
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Shape and dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile(abc.ABC):
    """One open file of named tensors; a context manager.

    Opening checks the whole structure against the size of the file, so that `read` never
    allocates more than the file holds. The values themselves are not checked.
    """

    def __init__(
        self, path: Path, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None
    ):
        self.path = path
        self.infos = dict(infos)
        self.metadata = dict(metadata or {})

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors in the order of the file."""
        return tuple(self.infos)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.infos[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self.infos[name].dtype

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """Reads one tensor into a fresh contiguous array, which outlives the file."""

    @abc.abstractmethod
    def close(self) -> None:
        """Gives the file back; nothing can be read afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
