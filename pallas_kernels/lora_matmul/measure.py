"""Checks and times tiles of the LoRA kernels on the device at hand.

A run is some calls, each on a layer of its own, and runs take turns at the adapters: as in a step
of a model, what a call reads of an adapter comes from the device's memory, not from a cache.
T rows, D input width, E output width, L layers, S adapter slots, N rows that are checked.
"""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lora_matmul import triton, triton_linear
from pallas_kernels.lora_matmul.candidates import Task
from pallas_kernels.lora_matmul.layout import PAGE_RANKS, LoraPool, RowTiles
from pallas_kernels.lora_matmul.tiles import for_usual_ranks
from pallas_kernels.lora_matmul.tuned import LINEAR, LORA
from pallas_kernels.tuning.compilers import CompileError, Compilers, first_line, load
from pallas_kernels.tuning.search import Outcome
from pallas_kernels.tuning.shapes import LinearShape
from pallas_kernels.tuning.table import Segments

LAYERS, SLOTS, RANK = 32, 32, 64
SLOT_PAGES = RANK // PAGE_RANKS
WEIGHTS = 4  # among which the calls of a run take turns: no cache holds them all
MOST_RESULTS, LEAST_CALLS = 2**29, 8  # elements that the calls of a run write
ADAPTERS: Mapping[Segments, int] = {"few": 1, "some": 8, "many": SLOTS}
MOST_VARIANTS = 8
CHECKED_ROWS = 128
# h and y are rounded once each, to 8 significant bits: the largest of a million errors is half of
# this.
RTOL = 2**-6
SAMPLES, SAMPLE_S, WARM_UP_RUNS = 5, 2e-3, 2


class DeviceLostError(RuntimeError):
    """A tile has brought the device down: nothing runs in this process any more."""

    def __init__(self, tile: Any, reason: str):
        super().__init__(
            f"the device failed, with {tile}: {reason}; start again: it goes on where it was, "
            "without that tile"
        )
        self.tile, self.reason = tile, reason


class Measurements:
    """Random adapters for a product of linears, and batches that bring them."""

    def __init__(self, task: Task, compilers: Compilers):
        self._task, self._compilers = task, compilers
        self._calls = min(LAYERS, max(LEAST_CALLS, MOST_RESULTS // (task.tokens * task.columns)))
        self._pending: dict[Any, Callable[[], bytes | str]] = {}
        self._batches = _batches(task)
        self._operands = _operands(task)
        self._wanted: dict[Segments, jax.Array] = {}

    def start(self, tiles: Sequence[Any]) -> None:
        """Begins to compile tiles."""
        arguments = (*self._operands, self._batches["few"][0])
        shapes = jax.tree.map(lambda of: jax.ShapeDtypeStruct(of.shape, of.dtype), arguments)
        how = dict(columns=_first_columns(self._task.linear), calls=self._calls)
        for tile in tiles:
            run = functools.partial(RUNS[self._task.op], tile=tile, **how)
            self._pending[tile] = self._compilers.submit(run, shapes)

    def finish(self) -> dict[Any, Outcome]:
        """Times the tiles that were started, at every class of segments that the rows can have.

        Raises:
          DeviceLostError: a tile has brought the device down.
        """
        outcomes: dict[Any, Outcome] = {}
        for tile, program in self._pending.items():
            try:
                outcomes[tile] = self._time(program())
            except CompileError as failure:
                outcomes[tile] = str(failure)
            except jax.errors.JaxRuntimeError as failure:
                outcomes[tile] = reason = first_line(failure)
                _check_alive(tile, reason)
        self._pending = {}
        return outcomes

    def _time(self, program: bytes | str) -> Outcome:
        arguments = (*self._operands, self._batches["few"][0])
        run = load(program, arguments, result=[0] * self._calls)
        us = {}
        for segments, variants in self._batches.items():
            if segments not in self._wanted:
                self._wanted[segments] = self._make_wanted(segments)
            last_TE = run(*self._operands, variants[0])[-1]
            got_NE = last_TE[_checked_rows(self._task)]
            error = float(distance(got_NE, self._wanted[segments], rtol=RTOL))
            if not error <= 1:  # NaN is wrong, too
                return f"wrong by {error:.2g} times the tolerance with {segments} adapters"
            run_us = _us_of_run(functools.partial(run, *self._operands), variants)
            us[segments] = round(run_us / self._calls, 2)
        return us

    def _make_wanted(self, segments: Segments) -> jax.Array:
        """What the last call of a run makes of the first variant, in float32 by XLA."""
        row_N, last = _checked_rows(self._task), self._calls - 1
        x_TD, weights, pools = self._operands
        slot_N = _slots(self._task.tokens, 0, ADAPTERS[segments])[row_N]
        weight = weights[last % len(weights)] if weights else None
        return _dense(x_TD[row_N], weight, pools, slot_N, last)


@jax.jit
def _dense(x_ND, w_DE, pools, slot_N, layer) -> jax.Array:
    """The base product, if any, and one adapter after the other, each with all rows."""
    product = functools.partial(jnp.matmul, precision="highest")
    x_ND = x_ND.astype(jnp.float32)

    def add(slot, u_NE, *, pool: LoraPool):
        first_W = (layer * pool.layer_pages + pool.page_SW[slot]) * PAGE_RANKS
        row_R = (first_W[:, None] + jnp.arange(PAGE_RANKS)).reshape(-1)
        a_RD, b_RE = (of[row_R].astype(jnp.float32) for of in (pool.a_RD, pool.b_RE))
        scale_N = jnp.where(slot_N == slot, pool.scale_LS[layer, slot], 0)
        return u_NE + product(scale_N[:, None] * product(x_ND, a_RD.T), b_RE)

    updates = [
        jax.lax.fori_loop(
            0,
            slot_N.max() + 1,
            functools.partial(add, pool=pool),
            jnp.zeros((len(slot_N), pool.b_RE.shape[1])),
        )
        for pool in pools
    ]
    y_NE = 0 if w_DE is None else product(x_ND, w_DE.astype(jnp.float32))
    return y_NE + jnp.concatenate(updates, axis=1)


def _run_lora(x_TD, _, pools, row_tiles, *, tile, columns: tuple[int, ...], calls: int):
    """Updates alone, which base products that come after them add."""
    updates = []
    for layer in range(calls):
        if updates:
            x_TD, updates[-1] = after(x_TD, updates[-1])
        update_TE = triton.lora_update(
            x_TD,
            pools,
            row_tiles,
            np.int32(layer),
            columns=columns,
            E=columns[-1] + pools[-1].b_RE.shape[1],
            dtype=x_TD.dtype,
            tile=for_usual_ranks(tile),  # as it is looked up
        )
        updates.append(update_TE)
    return updates


def _run_linear(x_TD, weights, pools, row_tiles, *, tile, columns: tuple[int, ...], calls: int):
    ys, counters = [], (jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    for layer in range(calls):
        y_TE, *counters = triton_linear.lora_linear(
            x_TD,
            weights[layer % len(weights)],
            None,
            pools,
            row_tiles,
            np.int32(layer),
            *counters,
            columns=columns,
            cut=tile,
        )
        ys.append(y_TE)
    return ys


def after(x_TD: jax.Array, y_TE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as they are, in one dtype; x written anew once y is there, as before a model's calls.

    Else XLA starts what is small in a call, such as `x @ A`, beside the products before it; and x
    would have left the cache, where a step of many rows finds part of it.
    """
    # Without barriers x, and one number of y, could become part of any kernel.
    y_TE = jax.lax.optimization_barrier(y_TE)
    # XLA cannot know that y is never NaN.
    one_11 = jnp.where(jnp.isnan(y_TE[:1, :1]), y_TE[:1, :1], 1)
    return jax.lax.optimization_barrier(x_TD * one_11), y_TE


RUNS: Mapping[str, Callable] = {LORA: _run_lora, LINEAR: _run_linear}


def _us_of_run(run: Callable, variants: Sequence[RowTiles]) -> float:
    """Median microseconds, of runs back to back."""
    turns = itertools.cycle(variants)

    def seconds(runs: int) -> float:
        results = None
        began_s = time.perf_counter()
        for _ in range(runs):
            results = run(next(turns))
        jax.block_until_ready(results)
        return (time.perf_counter() - began_s) / runs

    seconds(WARM_UP_RUNS)
    runs = math.ceil(SAMPLE_S / seconds(WARM_UP_RUNS))
    return 1e6 * statistics.median(seconds(runs) for _ in range(SAMPLES))


@jax.jit
def distance(got_NE, want_NE, *, rtol: float):
    """Largest error over what is allowed: a share of the value, or of a typical one near zero."""
    allowed_NE = rtol * jnp.maximum(abs(want_NE), want_NE.std())
    return (abs(got_NE.astype(jnp.float32) - want_NE) / allowed_NE).max()


def _first_columns(linear: LinearShape) -> tuple[int, ...]:
    return tuple(itertools.accumulate(linear.columns, initial=0))[:-1]


def _slots(tokens: int, first: int, adapters: int) -> jax.Array:
    """`[T]` slot of each row: an equal share for each adapter, sorted."""
    return jnp.asarray(first + np.arange(tokens) * adapters // tokens, jnp.int32)


_row_tiles = jax.jit(RowTiles.of, static_argnames="block_rows")


def _batches(task: Task) -> dict[Segments, list[RowTiles]]:
    """Row tiles of a few sets of adapters, by class."""
    return {
        segments: [
            _row_tiles(_slots(task.tokens, first, adapters), block_rows=task.block_rows)
            for first in range(0, SLOTS - adapters + 1, max(adapters, SLOTS // MOST_VARIANTS))
        ]
        for segments, adapters in ADAPTERS.items()
        if adapters <= task.tokens
    }


def _checked_rows(task: Task) -> np.ndarray:
    """As many of any number of rows, some of them twice, so that the oracle compiles once."""
    return np.linspace(0, task.tokens - 1, CHECKED_ROWS).astype(np.int32)


def _operands(task: Task) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[LoraPool, ...]]:
    """Input, base weights where the operator multiplies them, and pools."""
    width = task.linear.width
    x_TD = _normal(jax.random.key(2), task.tokens, width, scale=1.0)
    keys = jax.random.split(jax.random.key(1), WEIGHTS if task.op == LINEAR else 0)
    weights = tuple(_normal(key, width, task.columns, scale=width**-0.5) for key in keys)
    return x_TD, weights, _pools(task.linear)


def _pools(linear: LinearShape) -> tuple[LoraPool, ...]:
    """Every slot has an adapter; its pages are scattered, as in a server that has run for long."""
    page_order = np.random.default_rng(0).permutation(SLOTS * SLOT_PAGES) + 1
    rows = LAYERS * (1 + SLOTS * SLOT_PAGES) * PAGE_RANKS
    key_a, key_b = jax.random.split(jax.random.key(0))
    return tuple(
        LoraPool(
            a_RD=_normal(
                jax.random.fold_in(key_a, part), rows, linear.width, scale=linear.width**-0.5
            ),
            b_RE=_normal(jax.random.fold_in(key_b, part), rows, columns, scale=0.1),
            scale_LS=jnp.linspace(0.5, 2.0, LAYERS * SLOTS).reshape(LAYERS, SLOTS),
            page_SW=jnp.asarray(page_order.reshape(SLOTS, SLOT_PAGES), jnp.int32),
            pages_S=jnp.full(SLOTS, SLOT_PAGES, jnp.int32),
        )
        for part, columns in enumerate(linear.columns)
    )


@functools.partial(jax.jit, static_argnames=("rows", "columns"))
def _normal(key, rows: int, columns: int, *, scale: float) -> jax.Array:
    return jax.random.normal(key, (rows, columns), jnp.bfloat16) * jnp.bfloat16(scale)


def _check_alive(tile: Any, reason: str) -> None:
    try:
        jax.block_until_ready(jnp.zeros(1) + 1)
    except jax.errors.JaxRuntimeError as error:
        raise DeviceLostError(tile, reason) from error
