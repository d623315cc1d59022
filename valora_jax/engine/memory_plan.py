"""Where the device's memory goes, decided before it is taken and printed at the start."""

import dataclasses
import os

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from valora_jax.config import EngineConfig
from valora_jax.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Sizes in bytes, but for the counts of pages.

    Attributes:
      copy_bytes: of the merged copy; 0 where there is none.
      staged_bytes: left free for adapters on their way to the pool; all else is taken at the start.
      kv_pages: pages of the cache, the scratch page included.
      request_pages: pages that the longest request takes.
      max_request_tokens: prompt and answer together.
    """

    weights_bytes: int
    copy_bytes: int
    adapters_bytes: int
    staged_bytes: int
    features_bytes: int
    sampler_bytes: int
    page_bytes: int
    kv_pages: int
    request_pages: int
    max_request_tokens: int
    free_bytes: int

    @classmethod
    def make(
        cls,
        config: EngineConfig,
        spec: ModelSpec,
        *,
        dtype: np.dtype,
        weights_bytes: int,
        copy_bytes: int,
        adapters_bytes: int,
        staged_bytes: int,
        free_bytes: int,
    ) -> "MemoryPlan":
        """Sizes the cache: what all requests at their longest can use, if the memory allows.

        Args:
          dtype: of the cache and the image features.
          weights_bytes: taken already.
          copy_bytes: that a merged copy would take; it is left out where the cache needs them.
          adapters_bytes: that the adapter pool will take.
          staged_bytes: that adapters on their way to it may take.
          free_bytes: on the device now, with the weights loaded.

        Raises:
          ValueError: not even one request of the configured length would fit.
        """
        features_bytes = config.image_slots * spec.tokens_per_image * spec.width * dtype.itemsize
        # Counts are int32, and a flag of a byte, for each running request and padding.
        sampler_bytes = (config.max_requests + 1) * spec.vocab_rows * 5
        page_elements = 2 * spec.layers * spec.kv_heads * config.page_tokens * spec.head_width
        page_bytes = page_elements * dtype.itemsize
        limit = min(config.max_request_tokens or spec.max_positions, spec.max_positions)
        request_pages = -(-limit // config.page_tokens)
        fraction = config.memory_fraction or (0.2 if jax.default_backend() == "cpu" else 0.9)
        left_bytes = int(fraction * free_bytes)
        left_bytes -= adapters_bytes + staged_bytes + features_bytes + sampler_bytes
        wanted = config.kv_pages or 1 + config.max_requests * request_pages
        if not _has_room_for(copy_bytes, left_bytes, config, cache_bytes=wanted * page_bytes):
            copy_bytes = 0
        left_bytes -= copy_bytes
        kv_pages = config.kv_pages or min(wanted, left_bytes // page_bytes)
        plan = cls(
            weights_bytes=weights_bytes,
            copy_bytes=copy_bytes,
            adapters_bytes=adapters_bytes,
            staged_bytes=staged_bytes,
            features_bytes=features_bytes,
            sampler_bytes=sampler_bytes,
            page_bytes=page_bytes,
            kv_pages=kv_pages,
            request_pages=request_pages,
            max_request_tokens=limit,
            free_bytes=free_bytes,
        )
        plan._check(left_bytes)
        return plan

    def _check(self, left_bytes: int) -> None:
        """Refuses a cache that does not fit into what is left for it, or holds no request."""
        if self.kv_pages < 2 or self.kv_pages * self.page_bytes > left_bytes:
            raise ValueError(
                f"{max(left_bytes, 0) / 2**30:.2f} GiB of {self.free_bytes / 2**30:.2f} GiB free "
                "memory are left for the key-value cache, which needs "
                f"{max(self.kv_pages, 2)} pages of {self.page_bytes / 2**20:.2f} MiB; lower "
                "max_adapters, lora_pages, image_slots or kv_pages, or raise memory_fraction"
            )

    def print(self, console: Console) -> None:
        """Shows the plan as a table."""
        table = Table("memory", "MiB", "what for", title_justify="left")
        kv_bytes = self.kv_pages * self.page_bytes
        rows = (
            ("weights", self.weights_bytes, "loaded"),
            ("merged copy", self.copy_bytes, "of linears, to fold adapters into"),
            ("adapters", self.adapters_bytes, "rank pages, replaced heads, task heads"),
            ("adapters' way", self.staged_bytes, "of those that are copied to the device"),
            ("image features", self.features_bytes, "of recent images"),
            ("sampler", self.sampler_bytes, "last tokens and penalties"),
            ("key-value cache", kv_bytes, f"{self.kv_pages} pages; longest request "
             f"{self.max_request_tokens} tokens"),
            ("free before", self.free_bytes, "with the weights loaded"),
        )  # fmt: skip
        for name, size_bytes, what in rows:
            table.add_row(name, f"{size_bytes / 2**20:,.0f}", what)
        console.print(table)


def _has_room_for(
    copy_bytes: int, left_bytes: int, config: EngineConfig, *, cache_bytes: int
) -> bool:
    """Whether a copy leaves all configured pages, or half of what the cache could have and use."""
    least_bytes = cache_bytes if config.kv_pages else min(cache_bytes, left_bytes / 2)
    return left_bytes - copy_bytes >= least_bytes


def free_device_bytes() -> int:
    """Memory that the default device can still give: its allocator's limit, or the host's RAM."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
