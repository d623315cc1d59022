"""Which dtype serves a step fastest on this device, and the weights in it.

On a CPU decode steps read every weight for a few rows, where float32 wins, while prompts are bound
by arithmetic, where bfloat16 wins if the CPU has fast instructions for it: measured, since CPUs
with the same instruction set differ by a factor of three (docs/decisions.md).
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
_PROBE_ROWS, _PROBE_WIDTH, _PROBES = 256, 1024, 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Attributes:
    weights: dtype of the weights, the cache and decode steps.
    prompts: dtype of steps that hold prompt chunks, and of the vision tower.
    """

    weights: np.dtype
    prompts: np.dtype

    @classmethod
    def choose(cls, dtype: Dtype, *, stored: DTypeLike | None) -> "Precision":
        """Resolves "auto"; `stored` is what the checkpoint says of itself."""
        if dtype != "auto":
            return cls(weights=np.dtype(dtype), prompts=np.dtype(dtype))
        if jax.default_backend() == "cpu":
            fast = jnp.bfloat16 if bfloat16_gain() >= _WORTH_A_COPY else jnp.float32
            return cls(weights=np.dtype(np.float32), prompts=np.dtype(fast))
        sixteen_bit = stored if stored in ("float16", "bfloat16") else jnp.bfloat16
        return cls(weights=np.dtype(sixteen_bit), prompts=np.dtype(sixteen_bit))


def bfloat16_gain() -> float:
    """How many times faster than float32 this device multiplies a prompt's rows in bfloat16."""
    multiply = jax.jit(jnp.dot)
    factors = {
        dtype: (
            jnp.ones((_PROBE_ROWS, _PROBE_WIDTH), dtype),
            jnp.ones((_PROBE_WIDTH, 4 * _PROBE_WIDTH), dtype),
        )
        for dtype in (jnp.float32, jnp.bfloat16)
    }
    seconds = dict.fromkeys(factors, math.inf)
    # In turns, and often enough that clocks have risen and threads are awake for both.
    for _ in range(_PROBES):
        for dtype, (x, w) in factors.items():
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
