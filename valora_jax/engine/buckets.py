"""The shapes that steps are compiled for. Every step of the engine has one of them.

A decode bucket holds one token of each of D requests; a mixed bucket holds T tokens, those of
decoding requests first, then chunks of prompts. Attention and LoRA loop over run-time counts, so
neither lengths nor ranks are part of a shape.
"""

import dataclasses
import itertools
from collections.abc import Iterator

# A step's prompt chunks. More would only lengthen its arrays: prompts are longer than a few tokens.
MAX_CHUNKS = 8
SMALLEST_MIXED_TOKENS = 64


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
        decode_growth: int,
    ):
        """Decode sizes grow by `decode_growth`. Mixed sizes are spaced so that a prompt of one
        image and a short text, the usual one, is padded little."""
        sizes = itertools.takewhile(
            lambda n: n < max_requests, (decode_growth**i for i in itertools.count())
        )
        self.decode = [
            Bucket(tokens=n, decodes=n, chunks=0, rows=n) for n in [*sizes, max_requests]
        ]
        sizes = {SMALLEST_MIXED_TOKENS, tokens_per_image + SMALLEST_MIXED_TOKENS}
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
