"""What the LoRA benchmarks multiply: points, pools of random adapters, and who brings which.

T rows, D input width, E output width, P adapters of the batch, R ranks, L layers of the pool.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lora_rivals import Adapters
from pallas_kernels.lora_matmul import PAGE_RANKS, LoraPool, Part
from pallas_kernels.tuning.shapes import LinearShape

LAYERS, PAGES, SLOT_PAGES = 16, 256, 16
CHECKED_ROWS = 256
# What is computed has 8 significant bits, and h had, too.
RTOL = 2**-5


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
    def calls(self) -> int:
        """Of a run, on layer after layer: enough that the host keeps up."""
        return 2 * LAYERS if self.tokens <= 256 else LAYERS // 2

    @property
    def layers(self) -> int:
        return min(LAYERS, self.calls)

    def checked_rows(self) -> np.ndarray:
        """`[N]` the rows whose results are compared."""
        return np.linspace(0, self.tokens - 1, min(self.tokens, CHECKED_ROWS)).astype(np.int32)


class Pools:
    """Random rank pages for one product, in every one of which another adapter may lie."""

    def __init__(self, shape: LinearShape):
        self.shape = shape

    @functools.cached_property
    def _pages(self) -> list[tuple[jax.Array, jax.Array]]:
        """Of A and B, for each group of columns."""
        shape = self.shape
        keys = jax.random.split(jax.random.key(0), (2, len(shape.columns)))
        a = functools.partial(_random_pages, width=shape.width, scale=shape.width**-0.5)
        b = functools.partial(_random_pages, scale=0.2)
        return [
            (a(key_a), b(key_b, width=width))
            for key_a, key_b, width in zip(*keys, shape.columns, strict=True)
        ]

    def parts(self, point: Point) -> list[Part]:
        """The pools, with tables that put the point's adapters into slots."""
        slots = len(point.ranks)
        # Pages of an adapter are scattered, as in a server that has run for long.
        page_order = iter(np.random.default_rng(0).permutation(PAGES) + 1)
        page_SW = np.zeros((PAGES, SLOT_PAGES), np.int32)
        pages_S = np.zeros(PAGES, np.int32)
        for slot in range(slots):
            pages_S[slot] = pages = point.pages[slot]
            page_SW[slot, :pages] = list(itertools.islice(page_order, pages))
        last_S = page_SW[np.arange(slots), pages_S[:slots] - 1]
        scale_LS = jnp.linspace(0.5, 2.0, LAYERS * PAGES).reshape(LAYERS, PAGES)
        tables = dict(scale_LS=scale_LS, page_SW=jnp.array(page_SW), pages_S=jnp.array(pages_S))
        columns = [0, *itertools.accumulate(self.shape.columns)]
        return [
            Part(pool=LoraPool(a_RD=_shortened(a_RD, point, last_S), b_RE=b_RE, **tables), column=c)
            for (a_RD, b_RE), c in zip(self._pages, columns[:-1], strict=True)
        ]


def slots(point: Point) -> jax.Array:
    """`[T]` slot of each row, sorted."""
    slot_T = np.arange(point.tokens) * len(point.ranks) // point.tokens
    return jnp.asarray(slot_T, jnp.int32)


def adapters(pool: LoraPool, point: Point) -> list[Adapters]:
    """The point's adapters, stacked, for each layer."""
    stack = functools.partial(_stack, pool, P=len(point.ranks), R=max(point.ranks))
    return [stack(np.int32(layer)) for layer in range(point.layers)]


@functools.partial(jax.jit, static_argnames=("P", "R"))
def _stack(pool: LoraPool, layer, *, P: int, R: int) -> Adapters:
    page_PW = pool.page_SW[:P, : math.ceil(R / PAGE_RANKS)]
    first_PW = (layer * pool.layer_pages + page_PW) * PAGE_RANKS
    row_PWr = first_PW[..., None] + jnp.arange(PAGE_RANKS)
    row_PR = row_PWr.reshape(P, -1)[:, :R]
    return Adapters(pool.a_RD[row_PR], pool.b_RE[row_PR], pool.scale_LS[layer, :P])


@jax.jit
def update(pool: LoraPool, x_ND, slot_N, layer):
    """Page by page, every row its own."""

    def add_page(nth, update_NE):
        page_N = jnp.where(nth < pool.pages_S[slot_N], pool.page_SW[slot_N, nth], 0)
        first_N = (layer * pool.layer_pages + page_N) * PAGE_RANKS
        row_Nr = first_N[:, None] + jnp.arange(PAGE_RANKS)
        a_NrD, b_NrE = (rows[row_Nr].astype(jnp.float32) for rows in (pool.a_RD, pool.b_RE))
        exact = dict(precision=jax.lax.Precision.HIGHEST)
        h_Nr = jnp.einsum("ND,NrD->Nr", x_ND, a_NrD, **exact)
        return update_NE + jnp.einsum("Nr,NrE->NE", h_Nr, b_NrE, **exact)

    zeros_NE = jnp.zeros((len(x_ND), pool.b_RE.shape[1]))
    update_NE = jax.lax.fori_loop(0, pool.pages_S[slot_N].max(), add_page, zeros_NE)
    return pool.scale_LS[layer, slot_N][:, None] * update_NE


def _shortened(a_RD: jax.Array, point: Point, last_S: np.ndarray) -> jax.Array:
    """Zeros where adapters end within their last page, `last_S`."""
    used_S = np.array([(rank - 1) % PAGE_RANKS + 1 for rank in point.ranks])
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
