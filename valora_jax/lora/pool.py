"""The device's rank pages: an adapter is written into them in place, and nothing compiles for it.

One write a page, of one shape a kind of linear, whatever the rank: short ranks are filled up with
zeros. `residency.Residency` says where an adapter goes. L layers, S adapter slots, W pages a slot,
D and E widths, r the 16 rank rows of a page, R rows of all pages.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.lora_matmul import MAX_RANK, PAGE_RANKS, LoraPool
from valora_jax.lora.adapter import Adapter, AdapterTarget, LoraPair
from valora_jax.lora.residency import REPLACED_HEADS, Placement


def pages_needed(adapter: Adapter) -> dict[str, int]:
    """Site -> pages that an adapter takes, as `Residency` wants it."""
    pages = {site: math.ceil(adapter.rank_of(site) / PAGE_RANKS) for site in adapter.pairs}
    return pages | ({REPLACED_HEADS: 1} if adapter.replaced_head_VD is not None else {})


class DevicePool:
    """The arrays, for `LoraBatch`. An upload replaces them: take them anew for every step.

    Attributes:
      pools: site name -> rank pages and scales.
      biases_LSE: site name -> `[layers, slots, E]` float32.
    """

    def __init__(
        self,
        target: AdapterTarget,
        *,
        pages_of_site: Mapping[str, int],
        slots: int,
        dtype: DTypeLike,
        biased_sites: Collection[str],
    ):
        """Takes all memory at once.

        Args:
          target: the model's sites; those that `pages_of_site` lacks serve no adapter.
          pages_of_site: site name -> pages, page 0 included; may name `REPLACED_HEADS`.
          slots: adapters at once.
          dtype: of rank pages.
          biased_sites: where adapters may bring a bias; a replaced linear does.
        """
        self.pools, self.biases_LSE = _empty(target, pages_of_site, slots, dtype, biased_sites)

    def refusals(self, adapter: Adapter) -> list[str]:
        """Biases and ranks that have no place here; empty if all have."""
        served = ", ".join(self.biases_LSE) or "no linear"
        biases = [
            f"{site}: brings a bias, which is served in {served}"
            for site, pairs in adapter.pairs.items()
            if site not in self.biases_LSE and any(p.bias_N is not None for p in pairs.values())
        ]
        return biases + [
            f"{site}: has rank {adapter.rank_of(site)}, served are ranks up to {MAX_RANK}"
            for site in sorted(adapter.pairs.keys() - self.biases_LSE.keys())
            if adapter.rank_of(site) > MAX_RANK
        ]

    def upload(self, adapter: Adapter, placement: Placement) -> None:
        """Writes an adapter to its place, behind the steps that are enqueued; does not wait.

        The adapter must be one that `refusals` has nothing against, here and of the `Residency`.
        """
        for site, pairs in adapter.pairs.items():
            for nth, page in enumerate(placement.pages[site]):
                rows = slice(nth * PAGE_RANKS, (nth + 1) * PAGE_RANKS)
                self._write_page(
                    site,
                    page,
                    a_RD={layer: pair.a_RK[rows] for layer, pair in pairs.items()},
                    b_RE={layer: pair.b_RN[rows] for layer, pair in pairs.items()},
                )
        self._write_slot(adapter.pairs, placement.slot, placement.pages)

    def warm_up(self) -> None:
        """Compiles every write by writing zeros to page 0 and slot 0. Only for an empty pool."""
        for site in self.pools:
            self._write_page(site, 0, a_RD={}, b_RE={})
        self._write_slot({}, 0, {})

    def _write_page(self, site: str, page: int, **rows_by_layer: Mapping[int, np.ndarray]) -> None:
        pool = self.pools[site]
        layers = pool.scale_LS.shape[0]
        written = {}
        for name, rows in rows_by_layer.items():
            pages_RD: jax.Array = getattr(pool, name)
            block_LrD = np.zeros((layers, PAGE_RANKS, pages_RD.shape[1]), pages_RD.dtype)
            for layer, rows_rD in rows.items():
                block_LrD[layer, : len(rows_rD)] = rows_rD
            written[name] = _write_page(pages_RD, block_LrD, np.int32(page))
        self.pools[site] = dataclasses.replace(pool, **written)

    def _write_slot(
        self,
        pairs_of: Mapping[str, Mapping[int, LoraPair]],
        slot: int,
        pages_of: Mapping[str, Sequence[int]],
    ) -> None:
        """Writes all sites in one go, also those that the adapter leaves alone."""
        slots = _Slots(
            scales_LS={site: pool.scale_LS for site, pool in self.pools.items()},
            biases_LSE=self.biases_LSE,
            pages_SW={site: pool.page_SW for site, pool in self.pools.items()},
            counts_S={site: pool.pages_S for site, pool in self.pools.items()},
        )
        values = _Slots(
            scales_LS={
                site: _stacked(
                    {i: p.scale for i, p in pairs_of.get(site, {}).items()}, pool.scale_LS
                )
                for site, pool in self.pools.items()
            },
            biases_LSE={
                site: _stacked({i: p.bias_N for i, p in pairs_of.get(site, {}).items()}, bias_LSE)
                for site, bias_LSE in self.biases_LSE.items()
            },
            pages_SW={
                site: _filled_up(pages_of.get(site, ()), width=pool.page_SW.shape[1])
                for site, pool in self.pools.items()
            },
            counts_S={site: np.int32(len(pages_of.get(site, ()))) for site in self.pools},
        )
        slots = _write_slot(slots, values, np.int32(slot))
        self.biases_LSE = slots.biases_LSE
        for site, pool in self.pools.items():
            self.pools[site] = dataclasses.replace(
                pool,
                scale_LS=slots.scales_LS[site],
                page_SW=slots.pages_SW[site],
                pages_S=slots.counts_S[site],
            )


def pool_bytes(
    target: AdapterTarget,
    *,
    pages_of_site: Mapping[str, int],
    slots: int,
    dtype: DTypeLike,
    biased_sites: Collection[str],
) -> int:
    """Bytes that a `DevicePool` of these arguments takes; allocates nothing."""
    shapes = jax.eval_shape(lambda: _empty(target, pages_of_site, slots, dtype, biased_sites))
    return sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(shapes))


def _empty(
    target: AdapterTarget,
    pages_of_site: Mapping[str, int],
    slots: int,
    dtype: DTypeLike,
    biased_sites: Collection[str],
) -> tuple[dict[str, LoraPool], dict[str, jax.Array]]:
    """Zeros for `DevicePool.pools` and `biases_LSE`."""
    pools, biases_LSE = {}, {}
    for site in target.sites:
        if (pages := pages_of_site.get(site.name)) is None:
            continue
        rows = site.layers * pages * PAGE_RANKS
        pools[site.name] = LoraPool(
            a_RD=jnp.zeros((rows, site.in_width), dtype),
            b_RE=jnp.zeros((rows, site.out_width), dtype),
            scale_LS=jnp.zeros((site.layers, slots), jnp.float32),
            page_SW=jnp.zeros((slots, _slot_pages(site.name, pages, biased_sites)), jnp.int32),
            pages_S=jnp.zeros(slots, jnp.int32),
        )
        if site.name in biased_sites:
            shape_LSE = (site.layers, slots, site.out_width)
            biases_LSE[site.name] = jnp.zeros(shape_LSE, jnp.float32)
    return pools, biases_LSE


def _slot_pages(site: str, pages: int, biased_sites: Collection[str]) -> int:
    """Most pages of one adapter: where linears are replaced whole, all that there are."""
    return pages if site in biased_sites else min(pages, MAX_RANK // PAGE_RANKS)


def _stacked(by_layer: Mapping[int, np.ndarray | float | None], like: jax.Array) -> np.ndarray:
    """The values of all layers for one slot of `like`; zeros where there is none."""
    out = np.zeros((like.shape[0], *like.shape[2:]), like.dtype)
    for layer, value in by_layer.items():
        out[layer] = 0 if value is None else value
    return out


def _filled_up(pages: Sequence[int], *, width: int) -> np.ndarray:
    out_W = np.zeros(width, np.int32)
    out_W[: len(pages)] = pages
    return out_W


@functools.partial(jax.jit, donate_argnums=0)
def _write_page(pages_RD: jax.Array, block_LrD: jax.Array, page: jax.Array) -> jax.Array:
    layers, ranks, width = block_LrD.shape
    pages_LrD = pages_RD.reshape(layers, -1, width)
    zero = jnp.int32(0)
    start = (zero, page * ranks, zero)
    return jax.lax.dynamic_update_slice(pages_LrD, block_LrD, start).reshape(pages_RD.shape)


class _Slots(NamedTuple):
    """What a slot has of its own, by site; or, without the axis S, the values of one slot."""

    scales_LS: Mapping[str, jax.Array | np.ndarray]
    biases_LSE: Mapping[str, jax.Array | np.ndarray]
    pages_SW: Mapping[str, jax.Array | np.ndarray]
    counts_S: Mapping[str, jax.Array | np.integer]


@functools.partial(jax.jit, donate_argnums=0)
def _write_slot(arrays: _Slots, values: _Slots, slot: jax.Array) -> _Slots:
    return _Slots(
        *(
            jax.tree.map(lambda into, value: into.at[:, slot].set(value), old, new)
            for old, new in zip(arrays[:2], values[:2], strict=True)
        ),
        *(
            jax.tree.map(lambda into, value: into.at[slot].set(value), old, new)
            for old, new in zip(arrays[2:], values[2:], strict=True)
        ),
    )
