"""Shapes of the "triton" kernel's blocks."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MergeTile:
    """One program's share of the weights; all are powers of two.

    Attributes:
      block_d: rows, of the linear's input width.
      block_e: columns at once, of its output width.
      blocks: of columns, one after the other.
      pages: rank pages a step of the loop over an adapter's ranks, of 16 rank rows each.
      warps: of a program.
      stages: steps of the loop that are loaded ahead; pages take two, for their ids.
    """

    block_d: int
    block_e: int
    blocks: int
    pages: int
    warps: int
    stages: int

    def __post_init__(self):
        for name in self.__slots__:
            value = getattr(self, name)
            if name != "stages" and (value < 1 or value & (value - 1)):
                raise ValueError(f"{name}={value} is not a power of two")
        if min(self.block_d, self.block_e) < 16:
            raise ValueError(f"blocks of {self.block_d} x {self.block_e} are smaller than 16 x 16")
        if self.stages < 1:
            raise ValueError(f"stages={self.stages} is not at least 1")


def default_tile(dtype: DTypeLike) -> MergeTile:
    """A tile for weights of a dtype: narrow, so that several programs share a processor.

    Products of float32 run outside the tensor cores, from registers.
    """
    if jnp.dtype(dtype).itemsize > 2:
        return MergeTile(block_d=64, block_e=64, blocks=1, pages=1, warps=4, stages=2)
    return MergeTile(block_d=64, block_e=64, blocks=16, pages=4, warps=4, stages=7)
