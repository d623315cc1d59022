"""The least that a piece of work can take: bytes over the memory's speed, products over the cores'.

Every weight, cache line and activation is counted once, whoever reads it how often.
"""

import dataclasses
from collections.abc import Sequence

# What an H100 SXM streams at best in practice; its data sheet says 3.35e12.
HBM_BYTES_PER_S = 3.0e12
# Dense products of 16-bit numbers, by the data sheet.
TENSOR_FLOPS_PER_S = 989e12
ITEM_BYTES = 2  # of bfloat16, in which everything here is stored


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """Attributes:
    bytes: read from and written to the device's memory.
    flops: additions and multiplications of matrix products.
    """

    bytes: float
    flops: float

    @property
    def floor_ms(self) -> float:
        """Whichever takes longer, alone."""
        return 1e3 * max(self.bytes / HBM_BYTES_PER_S, self.flops / TENSOR_FLOPS_PER_S)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: float) -> "Work":
        return Work(self.bytes * times, self.flops * times)


def adapters(*, tokens: int, ranks: Sequence[int], width: int, columns: Sequence[int]) -> Work:
    """Multiplies adapters of these ranks, an equal share of the tokens each, activations left out.

    Each of the linears side by side, `columns` wide, has its own of a rank.
    """
    items = len(columns) * width + sum(columns)
    flops = 2 * tokens * sum(ranks) / max(len(ranks), 1) * items
    return Work(ITEM_BYTES * sum(ranks) * items, flops)


def lora(*, tokens: int, ranks: Sequence[int], width: int, columns: Sequence[int]) -> Work:
    """Updates of base products: reads `[tokens, width]`, writes what they add."""
    rows = tokens * (width + sum(columns))
    own = adapters(tokens=tokens, ranks=ranks, width=width, columns=columns)
    return own + Work(ITEM_BYTES * rows, 0)


def merge(*, rank: int, width: int, columns: int) -> Work:
    """Reads the base, writes the copy, reads one adapter."""
    items = 2 * width * columns + rank * (width + columns)
    return Work(ITEM_BYTES * items, 2 * rank * width * columns)


def attention(
    *, tokens: int, kv_tokens: int, requests: int, heads: int, kv_heads: int, head_width: int
) -> Work:
    """Causal attention of each request's last `tokens` of `kv_tokens`, and the write of its own.

    Reads the fused q, k and v, and the keys and values before; writes the new ones and the output.
    """
    cached = (kv_tokens - tokens) * 2 * kv_heads
    new = tokens * (2 * heads + 4 * kv_heads)
    pairs = tokens * (kv_tokens - (tokens - 1) / 2)  # query and key, those that the mask lets pass
    items = requests * (cached + new) * head_width
    return Work(ITEM_BYTES * items, requests * 4 * pairs * heads * head_width)


def linear(*, tokens: int, weights: int) -> Work:
    """Products of `tokens` rows with matrices of so many weights in all, activations left out."""
    return Work(ITEM_BYTES * weights, 2 * tokens * weights)
