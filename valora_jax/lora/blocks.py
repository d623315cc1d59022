"""An adapter as the device's pool takes it: pages of one shape a site, filled up with zeros.

Making them is plain NumPy that needs no pool, so that any thread can do it. L layers, D and E a
site's widths, r the 16 rank rows of a page.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from pallas_kernels.lora_matmul import PAGE_RANKS
from valora_jax.lora.adapter import Adapter, LoraPair, LoraSite
from valora_jax.lora.residency import REPLACED_HEADS

type Array = jax.Array | np.ndarray


class Page(NamedTuple):
    """16 rank rows of all layers of a site, in the type of the pool."""

    a_LrD: Array
    b_LrE: Array


class PoolBlocks(NamedTuple):
    """What a `DevicePool` holds of one adapter; on the host, or on the device after a `device_put`.

    Attributes:
      pages: site -> its pages in the order of its ranks, for sites that the adapter touches.
      scale_L: site -> float32 for every site of the pool; 0 in layers that it leaves alone.
      bias_LE: site -> float32 for every site that serves biases.
    """

    pages: Mapping[str, Sequence[Page]]
    scale_L: Mapping[str, Array]
    bias_LE: Mapping[str, Array]


def pages_needed(adapter: Adapter) -> dict[str, int]:
    """Site -> pages that an adapter takes, as `Residency` wants it."""
    pages = {site: math.ceil(adapter.rank_of(site) / PAGE_RANKS) for site in adapter.pairs}
    return pages | ({REPLACED_HEADS: 1} if adapter.replaced_head_VD is not None else {})


def pool_blocks(
    adapter: Adapter, sites: Iterable[LoraSite], *, biased_sites: Collection[str], dtype: np.dtype
) -> PoolBlocks:
    """Makes an adapter's blocks for the sites of a pool whose pages are of `dtype`."""
    needed = pages_needed(adapter)
    pages, scale_L, bias_LE = {}, {}, {}
    for site in sites:
        pairs = adapter.pairs.get(site.name, {})
        if number := needed.get(site.name):
            pages[site.name] = [_page(site, pairs, nth, dtype=dtype) for nth in range(number)]
        scale_L[site.name] = np.zeros(site.layers, np.float32)
        for layer, pair in pairs.items():
            scale_L[site.name][layer] = pair.scale
        if site.name in biased_sites:
            bias_LE[site.name] = np.zeros((site.layers, site.out_width), np.float32)
            for layer, pair in pairs.items():
                bias_LE[site.name][layer] = 0 if pair.bias_N is None else pair.bias_N
    return PoolBlocks(pages, scale_L, bias_LE)


def _page(site: LoraSite, pairs: Mapping[int, LoraPair], nth: int, *, dtype: np.dtype) -> Page:
    """Rank rows `[16 * nth, 16 * nth + 16)` of a site's layers; zeros where there are none."""
    page = Page(
        np.zeros((site.layers, PAGE_RANKS, site.in_width), dtype),
        np.zeros((site.layers, PAGE_RANKS, site.out_width), dtype),
    )
    for layer, pair in pairs.items():
        for block_LrN, rows_RN in zip(page, (pair.a_RK, pair.b_RN), strict=True):
            rows_rN = rows_RN[nth * PAGE_RANKS : (nth + 1) * PAGE_RANKS]
            block_LrN[layer, : len(rows_rN)] = rows_rN
    return page
