"""The device's rank pages: an adapter is written into them in place, and nothing compiles for it.

Writes have few shapes, whatever the rank and whatever an adapter touches: the nth page of all sites
of a part of the model goes in one, and sites that have no such page get zeros on page 0.
`residency.Residency` says where an adapter goes. L layers, S adapter slots, W pages a slot, K
sites, D and E widths, r the 16 rank rows of a page, R rows of all pages.
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
from valora_jax.lora.adapter import Adapter, AdapterTarget, LoraSite
from valora_jax.lora.blocks import Array, Page, PoolBlocks, pool_blocks
from valora_jax.lora.residency import Placement


class DevicePool:
    """The arrays, for `LoraBatch`. A write replaces them: take them anew for every step.

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
        arrays = _empty(target, pages_of_site, slots, dtype, biased_sites)
        self.pools, self.biases_LSE, self._zeros_LrN = arrays
        self._sites = [site for site in target.sites if site.name in self.pools]
        self._parts = _parts_of_model(self._sites)
        self._dtype = jnp.dtype(dtype)

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

    def blocks(self, adapter: Adapter) -> PoolBlocks:
        """An adapter's arrays as `write` takes them, on the host; safe in any thread.

        The adapter must be one that `refusals` has nothing against, here and of the `Residency`.
        """
        return pool_blocks(
            adapter, self._sites, biased_sites=self.biases_LSE.keys(), dtype=self._dtype
        )

    def write(self, blocks: PoolBlocks, placement: Placement) -> None:
        """Writes an adapter to its place, behind the steps that are enqueued; does not wait.

        Fastest for blocks that a `device_put` brought to the device. The slot's scales, biases and
        pages are written for all sites, also those that the adapter leaves alone.
        """
        for part in self._parts:
            pages = {site.name: blocks.pages.get(site.name, ()) for site in part}
            for nth in range(max(map(len, pages.values()))):
                having = [name for name, of_site in pages.items() if nth < len(of_site)]
                self._write_pages(
                    part,
                    pages={name: pages[name][nth] for name in having},
                    ids={name: placement.pages[name][nth] for name in having},
                )
        self._write_slot(blocks, placement)

    def warm_up(self) -> None:
        """Compiles every write by writing zeros to page 0 and slot 0. Only for an empty pool."""
        for part in self._parts:
            self._write_pages(part, pages={}, ids={})
        nothing = self.blocks(Adapter(name="", source="", pairs={}))
        self._write_slot(jax.device_put(nothing), Placement(slot=0, pages={}))

    def _write_pages(
        self, part: Sequence[LoraSite], *, pages: Mapping[str, Page], ids: Mapping[str, int]
    ) -> None:
        """Writes a page of each site of a part; zeros to page 0 where `pages` has none."""
        written = _write_pages(
            [(self.pools[site.name].a_RD, self.pools[site.name].b_RE) for site in part],
            [pages.get(site.name, self._nothing(site)) for site in part],
            np.array([ids.get(site.name, 0) for site in part], np.int32),
        )
        for site, (a_RD, b_RE) in zip(part, written, strict=True):
            self.pools[site.name] = dataclasses.replace(self.pools[site.name], a_RD=a_RD, b_RE=b_RE)

    def _nothing(self, site: LoraSite) -> Page:
        return Page(
            self._zeros_LrN[site.layers, site.in_width],
            self._zeros_LrN[site.layers, site.out_width],
        )

    def _write_slot(self, blocks: PoolBlocks, placement: Placement) -> None:
        slots = _Slots(
            scale_LS={name: pool.scale_LS for name, pool in self.pools.items()},
            bias_LSE=self.biases_LSE,
            page_SW={name: pool.page_SW for name, pool in self.pools.items()},
            pages_S={name: pool.pages_S for name, pool in self.pools.items()},
        )
        # Without the pages, whose number would be part of the compiled write.
        values = blocks._replace(pages={})
        slots = _write_slot(slots, values, self._page_table(placement), np.int32(placement.slot))
        self.biases_LSE = slots.bias_LSE
        for name, pool in self.pools.items():
            self.pools[name] = dataclasses.replace(
                pool,
                scale_LS=slots.scale_LS[name],
                page_SW=slots.page_SW[name],
                pages_S=slots.pages_S[name],
            )

    def _page_table(self, placement: Placement) -> np.ndarray:
        """`[K, 1 + W]`: how many pages each site has, by name, and which.

        In one array: as many small copies to the device would take longer than the write.
        """
        width = max((pool.page_SW.shape[1] for pool in self.pools.values()), default=0)
        table_KW = np.zeros((len(self.pools), 1 + width), np.int32)
        for row_W, name in zip(table_KW, sorted(self.pools), strict=True):
            ids = placement.pages.get(name, ())
            row_W[: 1 + len(ids)] = [len(ids), *ids]
        return table_KW


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


class _Arrays(NamedTuple):
    """What a `DevicePool` consists of; `zeros` are of `(layers, width)`, a page for any site."""

    pools: dict[str, LoraPool]
    biases_LSE: dict[str, jax.Array]
    zeros_LrN: dict[tuple[int, int], jax.Array]


def _empty(
    target: AdapterTarget,
    pages_of_site: Mapping[str, int],
    slots: int,
    dtype: DTypeLike,
    biased_sites: Collection[str],
) -> _Arrays:
    arrays = _Arrays({}, {}, {})
    for site in target.sites:
        if (pages := pages_of_site.get(site.name)) is None:
            continue
        rows = site.layers * pages * PAGE_RANKS
        arrays.pools[site.name] = LoraPool(
            a_RD=jnp.zeros((rows, site.in_width), dtype),
            b_RE=jnp.zeros((rows, site.out_width), dtype),
            scale_LS=jnp.zeros((site.layers, slots), jnp.float32),
            page_SW=jnp.zeros((slots, _slot_pages(site.name, pages, biased_sites)), jnp.int32),
            pages_S=jnp.zeros(slots, jnp.int32),
        )
        if site.name in biased_sites:
            shape_LSE = (site.layers, slots, site.out_width)
            arrays.biases_LSE[site.name] = jnp.zeros(shape_LSE, jnp.float32)
        for width in (site.in_width, site.out_width):
            if (site.layers, width) not in arrays.zeros_LrN:
                shape_LrN = (site.layers, PAGE_RANKS, width)
                arrays.zeros_LrN[site.layers, width] = jnp.zeros(shape_LrN, dtype)
    return arrays


def _slot_pages(site: str, pages: int, biased_sites: Collection[str]) -> int:
    """Most pages of one adapter: where linears are replaced whole, all that there are."""
    return pages if site in biased_sites else min(pages, MAX_RANK // PAGE_RANKS)


def _parts_of_model(sites: Sequence[LoraSite]) -> list[list[LoraSite]]:
    """Sites by the part of the model that their names begin with, such as `decoder`."""
    parts: dict[str, list[LoraSite]] = {}
    for site in sites:
        parts.setdefault(site.name.partition(".")[0], []).append(site)
    return list(parts.values())


@functools.partial(jax.jit, donate_argnums=0)
def _write_pages(
    pools: Sequence[tuple[jax.Array, jax.Array]], pages: Sequence[Page], page_K: jax.Array
) -> list[tuple[jax.Array, jax.Array]]:
    return [
        (_written(a_RD, page.a_LrD, page_K[k]), _written(b_RE, page.b_LrE, page_K[k]))
        for k, ((a_RD, b_RE), page) in enumerate(zip(pools, pages, strict=True))
    ]


def _written(pages_RN: jax.Array, block_LrN: Array, page: jax.Array) -> jax.Array:
    layers, ranks, width = block_LrN.shape
    pages_LrN = pages_RN.reshape(layers, -1, width)
    zero = jnp.int32(0)
    start = (zero, page * ranks, zero)
    return jax.lax.dynamic_update_slice(pages_LrN, block_LrN, start).reshape(pages_RN.shape)


class _Slots(NamedTuple):
    """What every slot has of its own, by site."""

    scale_LS: dict[str, jax.Array]
    bias_LSE: dict[str, jax.Array]
    page_SW: dict[str, jax.Array]
    pages_S: dict[str, jax.Array]


@functools.partial(jax.jit, donate_argnums=0)
def _write_slot(slots: _Slots, blocks: PoolBlocks, table_KW: jax.Array, slot: jax.Array) -> _Slots:
    """Writes a slot: scales and biases of `blocks`, and the pages of a `_page_table`."""
    ids_KW, number_K = table_KW[:, 1:], table_KW[:, 0]
    scale_L, bias_LE = blocks.scale_L, blocks.bias_LE
    return _Slots(
        scale_LS={n: x.at[:, slot].set(scale_L[n]) for n, x in slots.scale_LS.items()},
        bias_LSE={n: x.at[:, slot].set(bias_LE[n]) for n, x in slots.bias_LSE.items()},
        page_SW={
            n: x.at[slot].set(ids_KW[k, : x.shape[1]])
            for k, (n, x) in enumerate(sorted(slots.page_SW.items()))
        },
        pages_S={
            n: x.at[slot].set(number_K[k]) for k, (n, x) in enumerate(sorted(slots.pages_S.items()))
        },
    )
