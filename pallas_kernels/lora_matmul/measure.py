"""Checks and times tiles of the LoRA kernels on the device at hand.

A run is `LAYERS` calls, each on a layer of its own, and runs take turns at the adapters: as in a
step of a model, what a call reads of an adapter comes from the device's memory, not from a cache.
T rows, D input width, E output width, L layers, S adapter slots, N rows that are checked.
"""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lora_matmul.api import Part, lora_matmul
from pallas_kernels.lora_matmul.candidates import Task
from pallas_kernels.lora_matmul.layout import PAGE_RANKS, LoraPool, RowTiles
from pallas_kernels.lora_matmul.tiles import LoraTile
from pallas_kernels.tuning.search import Outcome
from pallas_kernels.tuning.shapes import LinearShape
from pallas_kernels.tuning.table import Segments

LAYERS, SLOTS, RANK = 32, 32, 64
SLOT_PAGES = RANK // PAGE_RANKS
PRODUCTS = 4  # among which the calls of a run take turns, so that each is rounded a few times only
ADAPTERS: Mapping[Segments, int] = {"few": 1, "some": 8, "many": SLOTS}
MOST_VARIANTS = 8
COMPILE_THREADS = 8
CHECKED_ROWS = 256
# h is rounded once a call, y after each of the 8 calls that add to it, to 8 significant bits: the
# largest of a million errors is half of this.
RTOL = 2**-5
SAMPLES, SAMPLE_S, WARM_UP_RUNS = 5, 2e-3, 2


class DeviceLostError(RuntimeError):
    """A tile has brought the device down: nothing runs in this process any more."""

    def __init__(self, tile: LoraTile, reason: str):
        super().__init__(
            f"the device failed, with {tile}: {reason}; start again: it goes on where it was, "
            "without that tile"
        )
        self.tile, self.reason = tile, reason


class Measurements:
    """Random adapters for a product of linears, and batches that bring them."""

    def __init__(self, linear: LinearShape):
        self._linear = linear
        self._columns = list(itertools.accumulate(linear.columns, initial=0))[:-1]
        self._pools = _pools(linear)
        self._wanted = functools.lru_cache(maxsize=len(ADAPTERS))(self._make_wanted)

    def of(self, task: Task, tiles: Sequence[LoraTile]) -> dict[LoraTile, Outcome]:
        """Times the tiles at every class of segments that so many rows can have.

        Raises:
          DeviceLostError: a tile has brought the device down.
        """
        outcomes: dict[LoraTile, Outcome] = {}
        compiling = {}
        ys_TE, x_TD = _products(task), _input(task)
        batches = self._batches(task)
        # Timed only when nothing compiles beside it: compilers try kernels on the device, too.
        with ThreadPoolExecutor(COMPILE_THREADS) as threads:
            for tile in tiles:
                run = functools.partial(_run, tile=tile, columns=tuple(self._columns))
                try:
                    lowered = jax.jit(run, donate_argnums=0).lower(
                        ys_TE, x_TD, self._pools, batches["few"][0]
                    )
                except (NotImplementedError, ValueError) as refusal:
                    outcomes[tile] = _first_line(refusal)
                else:
                    compiling[tile] = threads.submit(lowered.compile)
        for tile, compiled in compiling.items():
            try:
                outcomes[tile] = self._time(task, compiled.result(), x_TD, batches)
            except jax.errors.JaxRuntimeError as failure:
                outcomes[tile] = reason = _first_line(failure)
                _check_alive(tile, reason)
        return outcomes

    def _time(self, task: Task, run, x_TD, batches) -> Outcome:
        us = {}
        for segments, variants in batches.items():
            ys_TE = run(_products(task), x_TD, self._pools, variants[0])
            error = self._error(task, segments, ys_TE[0])
            if not error <= 1:  # NaN is wrong, too
                return f"wrong by {error:.2g} times the tolerance with {segments} adapters"
            us[segments] = round(_us_of_call(run, ys_TE, x_TD, self._pools, variants), 2)
        return us

    def _batches(self, task: Task) -> dict[Segments, list[RowTiles]]:
        """Row tiles of a few sets of adapters, by class."""
        return {
            segments: [
                RowTiles.of(_slots(task.tokens, first, adapters), block_rows=task.block_rows)
                for first in range(0, SLOTS - adapters + 1, max(adapters, SLOTS // MOST_VARIANTS))
            ]
            for segments, adapters in ADAPTERS.items()
            if adapters <= task.tokens
        }

    def _error(self, task: Task, segments: Segments, got_TE: jax.Array) -> float:
        row_N = _checked_rows(task.tokens)
        want_NE = self._wanted(task.tokens, segments)
        return float(_distance(got_TE[row_N], want_NE))

    def _make_wanted(self, tokens: int, segments: Segments) -> jax.Array:
        """What a run makes of the first product with the first variant, in float32 by XLA."""
        task = Task(linear=self._linear, tokens=tokens, block_rows=64)
        row_N = _checked_rows(tokens)
        slot_N = _slots(tokens, 0, ADAPTERS[segments])[row_N]
        y_NE, x_ND = _products(task)[0][row_N], _input(task)[row_N]
        with jax.default_matmul_precision("highest"):
            return _reference(y_NE, x_ND, self._pools, slot_N, columns=tuple(self._columns))


def _run(ys_TE, x_TD, pools, row_tiles, *, tile: LoraTile, columns: tuple[int, ...]):
    ys_TE, parts = list(ys_TE), _parts(pools, columns)
    for layer in range(LAYERS):
        ys_TE[layer % PRODUCTS] = lora_matmul(
            ys_TE[layer % PRODUCTS],
            x_TD,
            parts,
            tiles=row_tiles,
            layer=layer,
            implementation="triton",
            tile=tile,
        )
    return ys_TE


@functools.partial(jax.jit, static_argnames="columns")
def _reference(y_TE, x_TD, pools, slot_T, *, columns: tuple[int, ...]) -> jax.Array:
    y_TE, x_TD = y_TE.astype(jnp.float32), x_TD.astype(jnp.float32)
    row_tiles = RowTiles.of(slot_T, block_rows=64)
    for layer in range(0, LAYERS, PRODUCTS):
        parts = _parts(pools, columns)
        y_TE = lora_matmul(y_TE, x_TD, parts, tiles=row_tiles, layer=layer, implementation="xla")
    return y_TE


def _parts(pools, columns: tuple[int, ...]) -> list[Part]:
    return [Part(pool=pool, column=c) for pool, c in zip(pools, columns, strict=True)]


def _us_of_call(run, ys_TE, x_TD, pools, variants: Sequence[RowTiles]) -> float:
    """Median microseconds of a call, of runs back to back."""
    turns = itertools.cycle(variants)

    def seconds(runs: int) -> float:
        nonlocal ys_TE
        began_s = time.perf_counter()
        for _ in range(runs):
            ys_TE = run(ys_TE, x_TD, pools, next(turns))
        jax.block_until_ready(ys_TE)
        return (time.perf_counter() - began_s) / runs

    seconds(WARM_UP_RUNS)
    runs = math.ceil(SAMPLE_S / seconds(WARM_UP_RUNS))
    return 1e6 / LAYERS * statistics.median(seconds(runs) for _ in range(SAMPLES))


@jax.jit
def _distance(got_NE, want_NE):
    """Largest error over what is allowed: a share of the value, or of a typical one near zero."""
    allowed_NE = RTOL * jnp.maximum(abs(want_NE), want_NE.std())
    return (abs(got_NE.astype(jnp.float32) - want_NE) / allowed_NE).max()


def _slots(tokens: int, first: int, adapters: int) -> jax.Array:
    """`[T]` slot of each row: an equal share for each adapter, sorted."""
    return jnp.asarray(first + np.arange(tokens) * adapters // tokens, jnp.int32)


def _checked_rows(tokens: int) -> np.ndarray:
    return np.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS)).astype(np.int32)


def _products(task: Task) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(1), PRODUCTS)
    return [_normal(key, task.tokens, task.columns, scale=1.0) for key in keys]


def _input(task: Task) -> jax.Array:
    return _normal(jax.random.key(2), task.tokens, task.linear.width, scale=1.0)


def _pools(linear: LinearShape) -> list[LoraPool]:
    """Every slot has an adapter; its pages are scattered, as in a server that has run for long."""
    page_order = np.random.default_rng(0).permutation(SLOTS * SLOT_PAGES) + 1
    rows = LAYERS * (1 + SLOTS * SLOT_PAGES) * PAGE_RANKS
    key_a, key_b = jax.random.split(jax.random.key(0))
    return [
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
    ]


@functools.partial(jax.jit, static_argnames=("rows", "columns", "scale"))
def _normal(key, rows: int, columns: int, *, scale: float) -> jax.Array:
    return jax.random.normal(key, (rows, columns), jnp.bfloat16) * jnp.bfloat16(scale)


def _check_alive(tile: LoraTile, reason: str) -> None:
    try:
        jax.block_until_ready(jnp.zeros(1) + 1)
    except jax.errors.JaxRuntimeError as error:
        raise DeviceLostError(tile, reason) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
