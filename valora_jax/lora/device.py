"""All that the device holds of adapters: rank pages, replaced heads and task heads.

An adapter comes in two parts: `stage`, which takes time and may happen in any thread, and `write`,
which only enqueues. In between its arrays take device memory beside the pool's.
"""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from valora_jax.config import EngineConfig
from valora_jax.lora.adapter import Adapter, AdapterTarget
from valora_jax.lora.blocks import Array, PoolBlocks
from valora_jax.lora.heads import HeadPool, TaskHeadBlocks, TaskHeadPool, head_bytes
from valora_jax.lora.pool import DevicePool, pool_bytes
from valora_jax.lora.residency import REPLACED_HEADS, Placement
from valora_jax.lora.staging import MAX_STAGED

# Of an adapter that are on their way at a time. What comes from the host waits for the steps that
# are enqueued, and a step's input for what was sent before it: 3 ms through a PCIe 5 slot.
_COMING_BYTES = 64 << 20


class StagedAdapter(NamedTuple):
    """One adapter's arrays on the device, before they are written to its place."""

    pool: PoolBlocks
    replaced_head_VD: Array | None
    task_head: TaskHeadBlocks | None


class DeviceAdapters:
    """The arrays; `residency.Residency` says where in them an adapter goes.

    Attributes:
      pages_of_site: site -> pages of its pool, page 0, which is zeros, included.
      pool: rank pages.
      heads: replaced heads.
      task_heads: task heads.
      uploads: how many adapters were written.
    """

    def __init__(self, config: EngineConfig, target: AdapterTarget, *, dtype: np.dtype):
        """Takes all memory at once; `dtype` is that of rank pages and replaced heads."""
        self.pages_of_site = _pages_of_site(config, target)
        self.pool = DevicePool(
            target,
            pages_of_site=self.pages_of_site,
            slots=config.max_adapters,
            dtype=dtype,
            biased_sites=_biased_sites(target),
        )
        self.heads = HeadPool(
            target, heads=config.max_replaced_heads, slots=config.max_adapters, dtype=dtype
        )
        self.task_heads = TaskHeadPool(
            target, slots=config.max_adapters, max_classes=config.max_classes
        )
        self.uploads = 0

    @staticmethod
    def size_bytes(config: EngineConfig, target: AdapterTarget, *, dtype: np.dtype) -> int:
        """What an instance would take, without what is staged."""
        pages, slots = _pages_of_site(config, target), config.max_adapters
        biased = _biased_sites(target)
        return (
            pool_bytes(target, pages_of_site=pages, slots=slots, dtype=dtype, biased_sites=biased)
            + head_bytes(target, heads=config.max_replaced_heads, slots=slots, dtype=dtype)
            + slots * config.max_classes * (target.width + 1) * 4
        )

    @classmethod
    def staged_bytes(cls, config: EngineConfig, target: AdapterTarget, *, dtype: np.dtype) -> int:
        """What adapters on their way take beside it, if each has an equal share of it at most.

        They are those that are staged, and one that the device is still to write to its place.
        """
        size_bytes = cls.size_bytes(config, target, dtype=dtype)
        return (MAX_STAGED + 1) * size_bytes // config.max_adapters

    def warm_up(self) -> None:
        """Compiles the writes; before any adapter is placed."""
        for part in (self.pool, self.heads, self.task_heads):
            part.warm_up()

    def refusals(self, adapter: Adapter) -> list[str]:
        """What of an adapter has no place here, the number of its pages aside; empty if all has."""
        return self.pool.refusals(adapter) + self.task_heads.refusals(adapter)

    def stage(self, adapter: Adapter) -> StagedAdapter:
        """Brings an adapter's arrays to the device and waits for that; safe in any thread."""
        arrays, structure = jax.tree.flatten(
            StagedAdapter(
                pool=self.pool.blocks(adapter),
                replaced_head_VD=self.heads.blocks(adapter),
                task_head=self.task_heads.blocks(adapter),
            )
        )
        # Each array is freed by itself: all of them together would keep Python's lock from other
        # threads for 10 ms.
        left, copies = collections.deque(arrays), []
        del arrays
        coming_bytes = arrived = 0
        while left:
            copies.append(jax.device_put(left.popleft()))
            coming_bytes += copies[-1].nbytes
            while coming_bytes > _COMING_BYTES:
                coming_bytes -= jax.block_until_ready(copies[arrived]).nbytes
                arrived += 1
        return jax.block_until_ready(jax.tree.unflatten(structure, copies))

    def write(self, staged: StagedAdapter, placement: Placement) -> None:
        """Enqueues an adapter's way to its place, behind steps that may still read what was there.

        Does not wait.
        """
        self.pool.write(staged.pool, placement)
        self.heads.write(staged.replaced_head_VD, placement)
        self.task_heads.write(staged.task_head, placement)
        self.uploads += 1


def _pages_of_site(config: EngineConfig, target: AdapterTarget) -> dict[str, int]:
    pages = {
        site.name: 1
        + (config.projector_lora_pages if _in_projector(site.name) else config.lora_pages)
        for site in target.sites
    }
    return pages | {REPLACED_HEADS: 1 + config.max_replaced_heads}


def _biased_sites(target: AdapterTarget) -> Sequence[str]:
    """Where adapters replace linears whole, biases included."""
    return [site.name for site in target.sites if _in_projector(site.name)]


def _in_projector(site: str) -> bool:
    return site.startswith("projector.")
