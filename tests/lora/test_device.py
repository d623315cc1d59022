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
