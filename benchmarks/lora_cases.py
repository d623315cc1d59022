"""The LoRA operator at one product of a model: our kernel, a fixed tile, and the rivals.

T rows, D input width, E output width, P adapters of the batch, R ranks, L layers of the pool.

A run calls the operator on one layer of the pool after the other, and the runs take turns at its
adapters, as long as there are others: caches do not hold what the next call reads.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import floors
from benchmarks.gpu import Program
from benchmarks.lora_rivals import GATHER_BYTES, RIVALS, Adapters
from pallas_kernels.lora_matmul import PAGE_RANKS, LoraPool, Part, RowTiles, lora_matmul
from pallas_kernels.lora_matmul.tiles import ExpandTile, LoraTile, ShrinkTile, block_rows
from pallas_kernels.tuning.shapes import LinearShape

LAYERS, PAGES, SLOT_PAGES = 16, 256, 16
INPUTS = 4  # products of one shape, in turn
MOST_VARIANTS = 16  # fewer adapters of rank 8 would stay in an H100's L2 cache
CHECKED_ROWS = 256
# y is rounded to 8 significant bits after each call that adds to it, h once a call.
RTOL = 2**-5
# What a server without tuning would take: one tile for all shapes.
FIXED_TILE = LoraTile(
    block_rows=64,
    row_programs=264,
    shrink=ShrinkTile(block_k=32, block_ranks=64, rank_programs=1, splits=1, warps=4, stages=3),
    expand=ExpandTile(block_columns=64, blocks=1, block_ranks=32, warps=4, stages=3),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One batch: `tokens` rows, an equal share for each adapter of these ranks."""

    tokens: int
    ranks: tuple[int, ...]

    @property
    def name(self) -> str:
        low, high = min(self.ranks), max(self.ranks)
        rank = f"r{low}" if low == high else f"r{low}-{high}"
        return f"t{self.tokens}/a{len(self.ranks)}/{rank}"

    @property
    def pages(self) -> list[int]:
        return [math.ceil(rank / PAGE_RANKS) for rank in self.ranks]

    @property
    def groups(self) -> int:
        """Disjoint sets of adapters that the pool holds."""
        return min(2 * MOST_VARIANTS, PAGES // sum(self.pages))

    @property
    def calls(self) -> int:
        """Of a run: enough that the host keeps up."""
        return 2 * LAYERS if self.tokens <= 256 else LAYERS // 2

    def group_of(self, variant: int, call: int) -> int:
        return (2 * variant + call // LAYERS) % self.groups


class Pools:
    """Random rank pages for one product, in every one of which another adapter may lie."""

    def __init__(self, shape: LinearShape):
        self.shape = shape
        keys = jax.random.split(jax.random.key(0), (2, len(shape.columns)))
        a = functools.partial(_random_pages, width=shape.width, scale=shape.width**-0.5)
        self._a_RD = [a(key) for key in keys[0]]
        self._b_RE = [
            _random_pages(key, width=width, scale=0.2)
            for key, width in zip(keys[1], shape.columns, strict=True)
        ]

    def parts(self, point: Point) -> list[Part]:
        """The pools, with tables that put the point's adapters, group after group, into slots."""
        slots = point.groups * len(point.ranks)
        # Pages of an adapter are scattered, as in a server that has run for long.
        page_order = iter(np.random.default_rng(0).permutation(PAGES) + 1)
        page_SW = np.zeros((PAGES, SLOT_PAGES), np.int32)
        pages_S = np.zeros(PAGES, np.int32)
        for slot in range(slots):
            pages_S[slot] = pages = point.pages[slot % len(point.ranks)]
            page_SW[slot, :pages] = list(itertools.islice(page_order, pages))
        last_S = page_SW[np.arange(slots), pages_S[:slots] - 1]
        scale_LS = jnp.linspace(0.5, 2.0, LAYERS * PAGES).reshape(LAYERS, PAGES)
        tables = dict(scale_LS=scale_LS, page_SW=jnp.array(page_SW), pages_S=jnp.array(pages_S))
        columns = [0, *itertools.accumulate(self.shape.columns)]
        return [
            Part(pool=LoraPool(a_RD=_shortened(a_RD, point, last_S), b_RE=b_RE, **tables), column=c)
            for a_RD, b_RE, c in zip(self._a_RD, self._b_RE, columns[:-1], strict=True)
        ]


class Batches:
    """Products and inputs of a number of rows."""

    def __init__(self, shape: LinearShape, tokens: int):
        self._shape_TE = (tokens, sum(shape.columns))
        keys = jax.random.split(jax.random.key(1), INPUTS)
        self.x_TD = [jax.random.normal(k, (tokens, shape.width), jnp.bfloat16) for k in keys]

    def products(self) -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(2), INPUTS)
        return [jax.random.normal(key, self._shape_TE, jnp.bfloat16) for key in keys]


def programs(
    pools: Pools, batches: Batches, points: Sequence[Point], *, name: str, model: str
) -> Iterator[Program]:
    """Every implementation at every point; all points have as many tokens as `batches`."""
    for point in points:
        parts = pools.parts(point)
        error = functools.partial(_error, point, parts, batches)
        ranks = sorted(set(point.ranks))
        common = dict(
            work=floors.lora(
                tokens=point.tokens,
                ranks=point.ranks,
                width=pools.shape.width,
                columns=pools.shape.columns,
            ),
            carry=batches.products,
            calls=point.calls,
            error=error,
        )
        for impl, run, variants in _implementations(pools, parts, batches, point):
            yield Program(
                name=f"{name}/{point.name}/{impl}",
                fields=dict(
                    model=model,
                    op="lora",
                    shape=name,
                    batch=point.tokens,
                    adapters=len(point.ranks),
                    rank=ranks[0] if len(ranks) == 1 else ranks,
                    rank_sum=sum(point.ranks),
                    impl=impl,
                ),
                run=run,
                variants=variants,
                **common,
            )


def _implementations(
    pools: Pools, parts: list[Part], batches: Batches, point: Point
) -> Iterator[tuple[str, Callable, list[tuple]]]:
    variants = range(min(MOST_VARIANTS, math.ceil(point.groups / 2)))
    height = block_rows(point.tokens)
    for impl, tile, rows in (("triton", None, height), ("fixed-tile", FIXED_TILE, 64)):
        run = functools.partial(_run_kernel, tile=tile, columns=[p.column for p in parts])
        tiles = {g: RowTiles.of(slots(point, g), block_rows=rows) for g in range(point.groups)}
        yield (
            impl,
            run,
            [
                (batches.x_TD, [p.pool for p in parts], _of_calls(point, v, tiles.__getitem__))
                for v in variants
            ],
        )
    if len(parts) > 1:  # a rival takes a launch a linear: the kernel's own figures say enough
        return
    adapters = functools.cache(functools.partial(_adapters, parts[0].pool, point))
    nth_T = slots(point, 0)
    for impl, rival in RIVALS.items():
        gathered = point.tokens * max(point.ranks) * (pools.shape.width + sum(pools.shape.columns))
        if impl == "gather-bmm" and gathered * floors.ITEM_BYTES > GATHER_BYTES:
            continue
        yield (
            impl,
            functools.partial(_run_rival, rival=rival),
            [
                (
                    batches.x_TD,
                    [
                        adapters(point.group_of(v, call), call % LAYERS)
                        for call in range(point.calls)
                    ],
                    nth_T,
                )
                for v in variants
            ],
        )


def slots(point: Point, group: int) -> jax.Array:
    """`[T]` slot of each row, sorted."""
    P = len(point.ranks)
    nth_T = np.arange(point.tokens) * P // point.tokens
    return jnp.asarray(group * P + nth_T, jnp.int32)


def _of_calls(point: Point, variant: int, of_group: Callable) -> list:
    """What each round over the layers takes, by its group of adapters."""
    rounds = range(0, point.calls, LAYERS)
    return [of_group(point.group_of(variant, call)) for call in rounds]


def _run_kernel(ys_TE, xs_TD, pools, tiles, *, tile, columns):
    parts = [Part(pool=pool, column=c) for pool, c in zip(pools, columns, strict=True)]
    ys_TE = list(ys_TE)
    for call in range(_calls(ys_TE)):
        n = call % INPUTS
        ys_TE[n] = lora_matmul(
            ys_TE[n],
            xs_TD[n],
            parts,
            tiles=tiles[call // LAYERS],
            layer=call % LAYERS,
            implementation="triton",
            tile=tile,
        )
    return ys_TE, None


def _calls(ys_TE) -> int:
    return Point(tokens=ys_TE[0].shape[0], ranks=(1,)).calls


def _run_rival(ys_TE, xs_TD, adapters, nth_T, *, rival):
    ys_TE = list(ys_TE)
    for call, own in enumerate(adapters):
        n = call % INPUTS
        ys_TE[n] = rival(ys_TE[n], xs_TD[n], own, nth_T)
    return ys_TE, None


def _adapters(pool: LoraPool, point: Point, group: int, layer: int) -> Adapters:
    """A group's adapters of one layer, stacked."""
    P, R = len(point.ranks), max(point.ranks)
    return _stack(pool, np.int32(group * P), np.int32(layer), P=P, R=R)


@functools.partial(jax.jit, static_argnames=("P", "R"))
def _stack(pool: LoraPool, slot, layer, *, P: int, R: int) -> Adapters:
    page_PW = jax.lax.dynamic_slice_in_dim(pool.page_SW, slot, P)[:, : math.ceil(R / PAGE_RANKS)]
    pages = pool.a_RD.shape[0] // LAYERS // PAGE_RANKS
    row_PWr = ((layer * pages + page_PW) * PAGE_RANKS)[..., None] + jnp.arange(PAGE_RANKS)
    row_PR = row_PWr.reshape(P, -1)[:, :R]
    scale_P = jax.lax.dynamic_slice_in_dim(pool.scale_LS[layer], slot, P)
    return Adapters(pool.a_RD[row_PR], pool.b_RE[row_PR], scale_P)


def _error(point: Point, parts: Sequence[Part], batches: Batches, returned) -> float:
    """The first product's largest error against float32, on some of its rows."""
    got_TE = returned[0][0]
    row_N = np.linspace(0, point.tokens - 1, min(point.tokens, CHECKED_ROWS)).astype(np.int32)
    want_NE = batches.products()[0][row_N].astype(jnp.float32)
    x_ND = batches.x_TD[0][row_N].astype(jnp.float32)
    for call in range(0, point.calls, INPUTS):
        slot_N = slots(point, point.group_of(0, call))[row_N]
        for part in parts:
            update_NE = _update(part.pool, x_ND, slot_N, np.int32(call % LAYERS))
            stop = part.column + update_NE.shape[1]
            want_NE = want_NE.at[:, part.column : stop].add(update_NE)
    return float(_distance(got_TE[row_N], want_NE))


@jax.jit
def _update(pool: LoraPool, x_ND, slot_N, layer):
    """Page by page, every row its own."""
    pages = pool.a_RD.shape[0] // LAYERS // PAGE_RANKS

    def add_page(nth, update_NE):
        page_N = jnp.where(nth < pool.pages_S[slot_N], pool.page_SW[slot_N, nth], 0)
        row_Nr = ((layer * pages + page_N) * PAGE_RANKS)[:, None] + jnp.arange(PAGE_RANKS)
        a_NrD, b_NrE = (rows[row_Nr].astype(jnp.float32) for rows in (pool.a_RD, pool.b_RE))
        exact = dict(precision=jax.lax.Precision.HIGHEST)
        h_Nr = jnp.einsum("ND,NrD->Nr", x_ND, a_NrD, **exact)
        return update_NE + jnp.einsum("Nr,NrE->NE", h_Nr, b_NrE, **exact)

    zeros_NE = jnp.zeros((len(x_ND), pool.b_RE.shape[1]))
    update_NE = jax.lax.fori_loop(0, pool.pages_S[slot_N].max(), add_page, zeros_NE)
    return pool.scale_LS[layer, slot_N][:, None] * update_NE


@jax.jit
def _distance(got_NE, want_NE):
    """Largest error over what is allowed: a share of the value, or of a typical one near zero."""
    allowed_NE = RTOL * jnp.maximum(abs(want_NE), want_NE.std())
    return (abs(got_NE.astype(jnp.float32) - want_NE) / allowed_NE).max()


def _shortened(a_RD: jax.Array, point: Point, last_S: np.ndarray) -> jax.Array:
    """Zeros where adapters end within their last page, `last_S`."""
    used_S = np.resize([(rank - 1) % PAGE_RANKS + 1 for rank in point.ranks], len(last_S))
    if (used_S == PAGE_RANKS).all():
        return a_RD
    kept_Pr = np.ones((1 + PAGES, PAGE_RANKS, 1), bool)
    kept_Pr[last_S] = (np.arange(PAGE_RANKS) < used_S[:, None])[..., None]
    pages_LPrD = a_RD.reshape(LAYERS, *kept_Pr.shape[:2], -1)
    return jnp.where(kept_Pr, pages_LPrD, 0).reshape(a_RD.shape)


@functools.partial(jax.jit, static_argnames=("width", "scale"))
def _random_pages(key, *, width: int, scale: float) -> jax.Array:
    """`[L * (1 + pages) * 16, width]`; page 0 is zeros."""
    pages = jax.random.normal(key, (LAYERS, 1 + PAGES, PAGE_RANKS, width), jnp.bfloat16) * scale
    return pages.at[:, 0].set(0).reshape(-1, width).astype(jnp.bfloat16)
