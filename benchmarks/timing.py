"""Times compiled programs on a GPU by back-to-back runs, so that the host is out of the way.

A program takes what its last run returned, so that runs follow each other and write in place. The
rest of its arguments stay where they are, as for other addresses the host may have to rewrite the
launches of a CUDA graph: they should be larger than the caches.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

SAMPLES = 11
WARM_UP_RUNS = 3
# Samples that spread more, as where something else kept the host busy, are taken again.
STEADY, ATTEMPTS = 1.15, 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Of one call of the operation, in milliseconds.

    Attributes:
      median_ms, p10_ms, p90_ms: over the samples.
      host_fraction: share of the time that the host took to enqueue the work. Near 1, the figure
        is the host's.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    host_fraction: float

    @property
    def spread(self) -> float:
        """p90 over p10, at least 1."""
        return self.p90_ms / self.p10_ms


def time_program[Carry](
    run: Callable[..., Carry],
    carry: Carry,
    inputs: tuple[Any, ...],
    *,
    calls: float,
    samples: int = SAMPLES,
    sample_ms: float = 4.0,
    sample_runs: int = 1,
) -> Timing:
    """Times `carry = run(carry, *inputs)`, in which the operation happens `calls` times.

    Where the samples spread by more than `STEADY` they are taken again, `ATTEMPTS` times at most;
    the attempt that spread least counts.

    Args:
      run: enqueues a run; may donate its first argument.
      carry: what the first run takes.
      inputs: the other arguments.
      calls: operations of one run; may be a share of one.
      samples: of which the median counts.
      sample_ms: least length of a sample.
      sample_runs: least runs of a sample.
    """

    def sample(runs: int) -> tuple[float, float]:
        """Seconds of the host, and of everything."""
        nonlocal carry
        start = time.perf_counter()
        for _ in range(runs):
            carry = run(carry, *inputs)
        enqueued = time.perf_counter()
        jax.block_until_ready(carry)
        return enqueued - start, time.perf_counter() - start

    jax.block_until_ready((carry, inputs))
    sample(WARM_UP_RUNS)
    seconds = sample(WARM_UP_RUNS)[1] / WARM_UP_RUNS
    runs = max(sample_runs, math.ceil(sample_ms / 1e3 / seconds))

    def attempt() -> Timing:
        taken = [sample(runs) for _ in range(samples)]
        per_call = [1e3 * total / runs / calls for _, total in taken]
        return Timing(
            median_ms=statistics.median(per_call),
            p10_ms=quantile(per_call, 0.1),
            p90_ms=quantile(per_call, 0.9),
            host_fraction=statistics.median(host / total for host, total in taken),
        )

    attempts = [attempt()]
    while attempts[-1].spread > STEADY and len(attempts) < ATTEMPTS:
        attempts.append(attempt())
    return min(attempts, key=lambda timing: timing.spread)


def quantile(values: Sequence[float], fraction: float) -> float:
    """The nearest of the values."""
    return sorted(values)[round(fraction * (len(values) - 1))]


def copy_bytes_per_s() -> float:
    """Bytes that this device reads and writes a second when it negates a large array in place."""
    numbers = jnp.ones(2**29, jnp.bfloat16)
    size = 2 * numbers.nbytes
    run = jax.jit(jnp.negative, donate_argnums=0)
    return size / (1e-3 * time_program(run, numbers, (), calls=1).median_ms)
