"""Which dtype serves a step fastest on this device, and the weights in it.

On a CPU bfloat16 wins where it has fast instructions for it: with prompts, which are bound by
arithmetic, and with decode steps of several rows, which are bound by reading weights. Both are
measured, since CPUs with the same instruction set differ by a factor of three (docs/decisions.md).
"""

import dataclasses
import math
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from valora_jax.config import Dtype

# A second copy of the weights has its price; a smaller gain is not worth it.
_WORTH_A_COPY = 1.3
_PROMPT_ROWS, _PROBE_WIDTH, _PROBES, _MATRICES = 256, 1024, 20, 4
# Of a decode step that may run in bfloat16; one row took ten times as long as in float32.
SEVERAL_ROWS = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Attributes:
    weights: dtype of the weights, adapters and decode steps of few rows.
    prompts: dtype of steps that hold prompt chunks and of the vision tower, and so of what these
      make: the key-value cache, image features.
    decodes: dtype of decode steps of at least `SEVERAL_ROWS`: that of the weights or of prompts.
    """

    weights: np.dtype
    prompts: np.dtype
    decodes: np.dtype

    @classmethod
    def choose(cls, dtype: Dtype, *, stored: DTypeLike | None) -> "Precision":
        """Resolves "auto"; `stored` is what the checkpoint says of itself."""
        if dtype != "auto":
            return cls.uniform(dtype)
        if jax.default_backend() == "cpu":
            if bfloat16_gain(_PROMPT_ROWS) < _WORTH_A_COPY:
                return cls.uniform(np.float32)
            narrow, wide = np.dtype(jnp.bfloat16), np.dtype(np.float32)
            decodes = narrow if bfloat16_gain(SEVERAL_ROWS) > 1 else wide
            return cls(weights=wide, prompts=narrow, decodes=decodes)
        return cls.uniform(stored if stored in ("float16", "bfloat16") else jnp.bfloat16)

    @classmethod
    def uniform(cls, dtype: DTypeLike) -> "Precision":
        """One dtype for everything."""
        return cls(weights=np.dtype(dtype), prompts=np.dtype(dtype), decodes=np.dtype(dtype))


def bfloat16_gain(rows: int) -> float:
    """How many times faster than float32 this device multiplies so many rows in bfloat16."""
    multiply = jax.jit(jnp.dot)
    factors = {
        dtype: (
            jnp.ones((rows, _PROBE_WIDTH), dtype),
            # As in a step, a matrix was last read so long ago that no cache has it.
            [jnp.ones((_PROBE_WIDTH, 4 * _PROBE_WIDTH), dtype) for _ in range(_MATRICES)],
        )
        for dtype in (jnp.float32, jnp.bfloat16)
    }
    seconds = dict.fromkeys(factors, math.inf)
    # In turns, and often enough that clocks have risen and threads are awake for both.
    for probe in range(_PROBES):
        for dtype, (x, matrices) in factors.items():
            w = matrices[probe % _MATRICES]
            start = time.perf_counter()
            multiply(x, w).block_until_ready()
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[jnp.float32] / seconds[jnp.bfloat16]


def in_dtype(weights: Mapping[str, jax.Array], dtype: np.dtype) -> dict[str, jax.Array]:
    """The weights for steps of `dtype`: matrices are cast; vectors, the embedding and the head, of
    which few rows are read or multiplied, stay the arrays that they are."""
    return {
        path: array.astype(dtype)
        if path.endswith(".kernel") and not path.startswith("decoder.head.")
        else array
        for path, array in weights.items()
    }
