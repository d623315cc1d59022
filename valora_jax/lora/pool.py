"""The device's rank pages: an adapter is written into them in place, and nothing compiles for it.

One write a page, of one shape a kind of linear, whatever the rank: short ranks are filled up with
zeros. `residency.Residency` says where an adapter goes. L layers, S adapter slots, D and E widths,
r the 16 rank rows of a page, R rows of all pages, N pages of all sites.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.lora_matmul import PAGE_RANKS, ActivePages, LoraPool
from valora_jax.lora.adapter import Adapter, AdapterTarget, LoraPair
from valora_jax.lora.residency import REPLACED_HEADS, Placement


def pages_needed(adapter: Adapter) -> dict[str, int]:
    """Site -> pages that an adapter takes, as `Residency` wants it."""
    pages = {site: math.ceil(adapter.rank_of(site) / PAGE_RANKS) for site in adapter.pairs}
    return pages | ({REPLACED_HEADS: 1} if adapter.replaced_head_VD is not None else {})


def unpack_active(active_2N: jax.Array, pages_of_site: Mapping[str, int]) -> dict[str, ActivePages]:
    """Slices what `Residency.active` packed, while a step is traced; the same `pages_of_site`."""
    out, start = {}, 0
    for site, pages in sorted(pages_of_site.items()):
        first, stop = start + 1, start + pages
        out[site] = ActivePages(
            page_P=active_2N[0, first:stop],
            owner_P=active_2N[1, first:stop],
            count=active_2N[0, start],
        )
        start = stop
    return out


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
        """Biases that have no place here; empty if all have."""
        return [
            f"{site}: brings a bias, which is served in {', '.join(self.biases_LSE) or 'no linear'}"
            for site, pairs in adapter.pairs.items()
            if site not in self.biases_LSE and any(p.bias_N is not None for p in pairs.values())
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
        self._write_slot(adapter.pairs, placement.slot)

    def warm_up(self) -> None:
        """Compiles every write by writing zeros to page 0 and slot 0. Only for an empty pool."""
        for site in self.pools:
            self._write_page(site, 0, a_RD={}, b_RE={})
        self._write_slot({}, 0)

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

    def _write_slot(self, pairs_of: Mapping[str, Mapping[int, LoraPair]], slot: int) -> None:
        """Writes all sites in one go, also those that the adapter leaves alone."""
        scales = {site: pool.scale_LS for site, pool in self.pools.items()}
        values = {
            site: _stacked({i: p.scale for i, p in pairs_of.get(site, {}).items()}, scale_LS)
            for site, scale_LS in scales.items()
        }
        biases = {
            site: _stacked({i: p.bias_N for i, p in pairs_of.get(site, {}).items()}, bias_LSE)
            for site, bias_LSE in self.biases_LSE.items()
        }
        arrays, new = (scales, self.biases_LSE), (values, biases)
        scales, self.biases_LSE = _write_slot(arrays, new, np.int32(slot))
        for site, scale_LS in scales.items():
            self.pools[site] = dataclasses.replace(self.pools[site], scale_LS=scale_LS)


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
        )
        if site.name in biased_sites:
            shape_LSE = (site.layers, slots, site.out_width)
            biases_LSE[site.name] = jnp.zeros(shape_LSE, jnp.float32)
    return pools, biases_LSE


def _stacked(by_layer: Mapping[int, np.ndarray | float | None], like: jax.Array) -> np.ndarray:
    """The values of all layers for one slot of `like`; zeros where there is none."""
    out = np.zeros((like.shape[0], *like.shape[2:]), like.dtype)
    for layer, value in by_layer.items():
        out[layer] = 0 if value is None else value
    return out


@functools.partial(jax.jit, donate_argnums=0)
def _write_page(pages_RD: jax.Array, block_LrD: jax.Array, page: jax.Array) -> jax.Array:
    layers, ranks, width = block_LrD.shape
    pages_LrD = pages_RD.reshape(layers, -1, width)
    zero = jnp.int32(0)
    start = (zero, page * ranks, zero)
    return jax.lax.dynamic_update_slice(pages_LrD, block_LrD, start).reshape(pages_RD.shape)


@functools.partial(jax.jit, donate_argnums=0)
def _write_slot[Tree](arrays: Tree, values: Tree, slot: jax.Array) -> Tree:
    """Writes `[layers, ...]` values into `[layers, slots, ...]` arrays."""
    return jax.tree.map(
        lambda into, value: jax.lax.dynamic_update_slice_in_dim(into, value[:, None], slot, axis=1),
        arrays,
        values,
    )
