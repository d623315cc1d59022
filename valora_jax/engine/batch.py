"""A plan as arrays: one int32 buffer a step, so that the host makes one transfer.

Field names are the same on both sides: `pack` fills them on the host, `unpack` slices them out of
the buffer while the step is traced. T tokens, D decode rows, C chunks, W pages a request, S
sampled rows, X banned tokens a row.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from valora_jax.engine.buckets import Bucket
from valora_jax.engine.sampler import MAX_BANNED

SCORE_ROWS = 64  # tokens scored in one call: bounds the logits, and is one shape for all steps

_FLOATS = frozenset(
    {
        "temperature",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BatchLayout:
    """Names and shapes of a step's fields, in the order of the buffer; equal to itself only."""

    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, bucket: Bucket, *, request_pages: int) -> "BatchLayout":
        """Args:
        bucket: the step's shape.
        request_pages: W, pages that the longest request takes.
        """
        T, D, C, S, W = bucket.tokens, bucket.decodes, bucket.chunks, bucket.rows, request_pages
        per_token = ("token", "token_row", "position", "page", "offset", "feature_row", "adapter")
        shapes = dict(cls.of_rows(S).shapes)
        shapes |= dict.fromkeys(per_token, (T,))
        shapes |= {"sample_index": (S,), "merged": ()}
        shapes |= {"decode_kv_len": (D,), "decode_page": (D, W), "decode_count": ()}
        if C:
            shapes |= dict.fromkeys(("chunk_start", "chunk_len", "chunk_kv_len"), (C,))
            shapes |= {"chunk_page": (C, W), "chunk_count": ()}
        return cls(shapes=shapes)

    @classmethod
    def of_rows(cls, rows: int) -> "BatchLayout":
        """How a step's rows are sampled. Every step's buffer begins with it, so that steps of as
        many rows share one function that samples."""
        per_row = ("state_row", "step", "seed", "top_k", *sorted(_FLOATS))
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(per_row, (rows,))
        return cls(shapes=shapes | {"banned": (rows, MAX_BANNED), "wants_logprobs": ()})

    @classmethod
    def of_scores(cls) -> "BatchLayout":
        """A block of a step's tokens to score: each one's adapter, and the token that follows."""
        return cls(shapes={"adapter": (SCORE_ROWS,), "target": (SCORE_ROWS,)})

    @classmethod
    def of_images(cls, images: int, *, vision_tokens: int) -> "BatchLayout":
        """Images to encode: the adapter of each row in the tower, and where their features go."""
        return cls(shapes={"adapter": (images * vision_tokens,), "first_row": (images,)})

    @property
    def rows(self) -> int:
        """That may bring an adapter."""
        return math.prod(self.shapes["adapter"])

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def buffer(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A zeroed buffer and writable views of its fields by name."""
        packed = np.zeros(self.size, np.int32)
        return packed, {
            name: field.view(np.float32) if name in _FLOATS else field
            for name, field in self._slices(packed)
        }

    def unpack(self, packed: jax.Array) -> dict[str, jax.Array]:
        """The traced inverse of `buffer`."""
        return {
            name: jax.lax.bitcast_convert_type(field, jnp.float32) if name in _FLOATS else field
            for name, field in self._slices(packed)
        }

    def _slices(self, packed):
        start = 0
        for name, shape in self.shapes.items():
            stop = start + math.prod(shape)
            yield name, packed[start:stop].reshape(shape)
            start = stop
