"""How adapters come to the device; what becomes of them there is in the tests of its pools."""

import jax
import numpy as np

from pallas_kernels.lora_matmul import PAGE_RANKS
from tests.lora.llava_tiny import GOLDENS
from valora_jax.config import EngineConfig
from valora_jax.lora.device import DeviceAdapters
from valora_jax.lora.staging import MAX_STAGED
from valora_jax.models import read_spec
from valora_jax.models.loading import read_config
from valora_jax.replay.random_adapters import random_adapters

TARGET = read_spec(read_config(GOLDENS.parent / "checkpoints" / "llava15-tiny")).adapter_target
FLOAT32 = np.dtype(np.float32)
PAGES, SLOTS = 2, 3
CONFIG = EngineConfig(max_adapters=SLOTS, lora_pages=SLOTS * PAGES)
[LARGEST] = random_adapters(TARGET, number=1, ranks=[PAGES * PAGE_RANKS], targets="all", seed=0)


def test_adapters_that_share_the_pool_equally_have_room_on_their_way():
    device = DeviceAdapters(CONFIG, TARGET, dtype=FLOAT32)
    of_one_bytes = sum(block.nbytes for block in jax.tree.leaves(device.stage(LARGEST)))
    room_bytes = DeviceAdapters.staged_bytes(CONFIG, TARGET, dtype=FLOAT32)
    assert (MAX_STAGED + 1) * of_one_bytes <= room_bytes


def test_a_step_waits_for_so_many_bytes_of_an_adapter_at_most(monkeypatch):
    """It copies behind all that is on its way: what was put and nobody has waited for."""
    device = DeviceAdapters(CONFIG, TARGET, dtype=FLOAT32)
    device_put, block_until_ready = jax.device_put, jax.block_until_ready
    on_their_way_bytes, seen_bytes = [], []

    def put(arrays):
        copies = device_put(arrays)
        on_their_way_bytes.extend(copy.nbytes for copy in jax.tree.leaves(copies))
        seen_bytes.append(sum(on_their_way_bytes))
        return copies

    def wait(copies):
        del on_their_way_bytes[: len(jax.tree.leaves(copies))]
        return block_until_ready(copies)

    widest = max(max(site.in_width, site.out_width) * site.layers for site in TARGET.sites)
    page_bytes = PAGE_RANKS * widest * FLOAT32.itemsize
    monkeypatch.setattr("valora_jax.lora.device._COMING_BYTES", 2 * page_bytes)
    monkeypatch.setattr(jax, "device_put", put)
    monkeypatch.setattr(jax, "block_until_ready", wait)
    staged = device.stage(LARGEST)
    assert page_bytes < max(seen_bytes) <= 3 * page_bytes
    assert on_their_way_bytes == []
    assert len(seen_bytes) == len(jax.tree.leaves(staged))
