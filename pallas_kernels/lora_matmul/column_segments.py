"""Which columns of linears side by side belong to which of them."""

from collections.abc import Sequence
from typing import NamedTuple

from pallas_kernels.lora_matmul.layout import LoraPool


class ColumnSegment(NamedTuple):
    """Columns of one part, or of none (-1)."""

    start: int
    stop: int
    part: int


def column_segments(
    pools: Sequence[LoraPool], columns: Sequence[int], E: int
) -> list[ColumnSegment]:
    """Returns all of E columns, in order; `columns` are the first ones of the pools' parts."""
    found, stop = [], 0
    for i in sorted(range(len(pools)), key=columns.__getitem__):
        if columns[i] > stop:
            found.append(ColumnSegment(stop, columns[i], -1))
        stop = columns[i] + pools[i].b_RE.shape[1]
        found.append(ColumnSegment(columns[i], stop, i))
    return [*found, ColumnSegment(stop, E, -1)] if stop < E else found
