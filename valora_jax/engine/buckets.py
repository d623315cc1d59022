"""The shapes that steps are compiled for. Every step of the engine has one of them.

A decode bucket holds one token of each of D requests; a mixed bucket holds T tokens, those of
decoding requests first, then chunks of prompts. Attention and LoRA loop over run-time counts, so
neither lengths nor ranks are part of a shape.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

type Spacing = Literal["coarse", "fine"]

# A step's prompt chunks. More would only lengthen its arrays: prompts are longer than a few tokens.
MAX_CHUNKS = 8
SMALLEST_MIXED_TOKENS = 64
_TILE_ROWS = 128


def default_step_tokens(*, max_requests: int, tokens_per_image: int) -> int:
    """Two of the usual prompts, an image and a short text. What a step costs apart from its prompts
    is shared by two then; with more of them a stream would wait longer for its next token."""
    return max(max_requests, 2 * (tokens_per_image + SMALLEST_MIXED_TOKENS))


@dataclasses.dataclass(frozen=True, kw_only=True, order=True, slots=True)
class Bucket:
    """One compiled shape.

    Attributes:
      tokens: length of the flat axis.
      decodes: most requests with one token; they come first.
      chunks: most prompt chunks; 0 in a decode bucket.
      rows: most tokens that are sampled from.
    """

    tokens: int
    decodes: int
    chunks: int
    rows: int


class Buckets:
    """The engine's set of shapes, smallest first."""

    def __init__(
        self,
        *,
        max_requests: int,
        max_tokens_per_step: int,
        tokens_per_image: int,
        spacing: Spacing,
    ):
        """Cuts sizes finely or coarsely.

        Args:
          max_requests, max_tokens_per_step: the largest sizes.
          tokens_per_image: a prompt of one and a short text, the usual one, is padded little.
          spacing: "fine" pads a step of many prompt tokens by a fifth at most, where time follows
            tokens and compilations are quick; "coarse" has as few sizes as will do.
        """
        growth = 2 if spacing == "fine" else 4
        sizes = itertools.takewhile(
            lambda n: n < max_requests, (growth**i for i in itertools.count())
        )
        self.decode = [
            Bucket(tokens=n, decodes=n, chunks=0, rows=n) for n in [*sizes, max_requests]
        ]
        sizes = {SMALLEST_MIXED_TOKENS, tokens_per_image + SMALLEST_MIXED_TOKENS}
        if spacing == "fine":
            sizes |= set(_multiples(below=max_tokens_per_step))
        sizes = {n for n in sizes if max_requests <= n < max_tokens_per_step}
        self.mixed = [
            Bucket(tokens=n, decodes=max_requests, chunks=MAX_CHUNKS, rows=max_requests)
            for n in sorted(sizes | {max_tokens_per_step})
        ]

    def __iter__(self) -> Iterator[Bucket]:
        yield from (*self.decode, *self.mixed)

    def choose(self, *, decodes: int, prompt_tokens: int) -> Bucket:
        """The smallest shape that holds a step of so many decode rows and prompt tokens."""
        if prompt_tokens == 0:
            return next(bucket for bucket in self.decode if bucket.decodes >= decodes)
        tokens = decodes + prompt_tokens
        return next(bucket for bucket in self.mixed if bucket.tokens >= tokens)


def _multiples(*, below: int) -> Iterator[int]:
    """Sizes that fill whole tiles of a matmul, each at most a quarter more than the last."""
    size = _TILE_ROWS
    while size < below:
        yield size
        size += max(_TILE_ROWS, size // 4 // _TILE_ROWS * _TILE_ROWS)
