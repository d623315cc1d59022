import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from tests.engine.engines import GOLDENS
from valora_jax.config import EngineConfig
from valora_jax.engine.memory_plan import MemoryPlan, free_device_bytes
from valora_jax.models import read_spec
from valora_jax.models.loading import read_config

SPEC = read_spec(read_config(GOLDENS / "checkpoints" / "llava15-tiny"))
CONFIG = EngineConfig(
    max_requests=3, max_request_tokens=100, page_tokens=16, image_slots=2, memory_fraction=0.5
)
# Keys and values of 4 layers and 4 heads of width 32, in float32.
PAGE_BYTES = 2 * 4 * 4 * 32 * 16 * 4
FEATURES_BYTES = 2 * 16 * 128 * 4
SAMPLER_BYTES = 4 * 704 * 5


def plan_of(config: EngineConfig = CONFIG, *, free_bytes: int = 2**30) -> MemoryPlan:
    return MemoryPlan.make(
        config,
        SPEC,
        dtype=np.dtype(np.float32),
        weights_bytes=5000,
        copy_bytes=0,
        adapters_bytes=7000,
        staged_bytes=3000,
        free_bytes=free_bytes,
    )


def test_pages_are_what_all_requests_at_their_longest_can_use():
    plan = plan_of()
    assert (plan.page_bytes, plan.features_bytes) == (PAGE_BYTES, FEATURES_BYTES)
    assert plan.sampler_bytes == SAMPLER_BYTES
    assert (plan.request_pages, plan.kv_pages) == (7, 1 + 3 * 7)


def test_little_memory_gives_the_pages_that_fit_and_not_one_more():
    fixed_bytes = 7000 + 3000 + FEATURES_BYTES + SAMPLER_BYTES
    for spare_bytes, pages in ((0, 5), (PAGE_BYTES - 1, 5), (PAGE_BYTES, 6)):
        free_bytes = 2 * (fixed_bytes + 5 * PAGE_BYTES + spare_bytes)
        assert plan_of(free_bytes=free_bytes).kv_pages == pages


def test_half_the_type_takes_half_the_bytes():
    plan = MemoryPlan.make(
        CONFIG,
        SPEC,
        dtype=np.dtype(np.float16),
        weights_bytes=0,
        copy_bytes=0,
        adapters_bytes=0,
        staged_bytes=0,
        free_bytes=2**30,
    )
    assert (2 * plan.page_bytes, 2 * plan.features_bytes) == (PAGE_BYTES, FEATURES_BYTES)


def test_a_request_is_no_longer_than_the_models_positions():
    for setting in (None, 10_000):
        config = dataclasses.replace(CONFIG, max_request_tokens=setting)
        assert plan_of(config).max_request_tokens == SPEC.max_positions == 4096


def test_configured_pages_are_taken_or_refused():
    config = dataclasses.replace(CONFIG, kv_pages=9)
    assert plan_of(config).kv_pages == 9
    with pytest.raises(ValueError, match=r"key-value cache, which needs 9 pages of 0\.06 MiB"):
        plan_of(config, free_bytes=2 * 9 * PAGE_BYTES)


@pytest.mark.parametrize("free_bytes", [0, 2**16])
def test_no_room_for_a_page_says_what_to_lower(free_bytes):
    with pytest.raises(ValueError, match=r"0\.00 GiB .* lower max_adapters, lora_pages"):
        plan_of(free_bytes=free_bytes)


def test_the_plan_is_shown_as_a_table():
    text = io.StringIO()
    plan_of().print(Console(file=text, width=100))
    for part in ("weights", "adapters", "22 pages; longest request 100 tokens", "1,024"):
        assert part in text.getvalue()


def test_the_device_has_free_memory():
    assert free_device_bytes() > 2**20


@pytest.mark.parametrize(
    ("copy_bytes", "kept"), [(100_000, True), (300_000, True), (600_000, False)]
)
def test_a_merged_copy_may_take_half_of_what_the_cache_could_have(copy_bytes, kept):
    config = EngineConfig(max_requests=64, image_slots=1, memory_fraction=1.0, page_tokens=16)
    sizes = dict(dtype=np.dtype(np.float32), weights_bytes=0, adapters_bytes=0, staged_bytes=0)
    free_bytes = (
        1_000_000
        + MemoryPlan.make(config, SPEC, copy_bytes=0, free_bytes=10**9, **sizes).features_bytes
    )
    without = MemoryPlan.make(config, SPEC, copy_bytes=0, free_bytes=free_bytes, **sizes)
    plan = MemoryPlan.make(config, SPEC, copy_bytes=copy_bytes, free_bytes=free_bytes, **sizes)
    assert plan.copy_bytes == (copy_bytes if kept else 0)
    lost_bytes = (without.kv_pages - plan.kv_pages) * plan.page_bytes
    assert abs(lost_bytes - plan.copy_bytes) <= plan.page_bytes


def test_pages_that_are_configured_go_before_a_merged_copy():
    fixed_bytes = 7000 + 3000 + FEATURES_BYTES + SAMPLER_BYTES
    config = dataclasses.replace(CONFIG, kv_pages=9)
    for spare_bytes, copy_bytes in ((PAGE_BYTES, 0), (6 * PAGE_BYTES, 5 * PAGE_BYTES)):
        plan = MemoryPlan.make(
            config,
            SPEC,
            dtype=np.dtype(np.float32),
            weights_bytes=5000,
            copy_bytes=5 * PAGE_BYTES,
            adapters_bytes=7000,
            staged_bytes=3000,
            free_bytes=2 * (fixed_bytes + 9 * PAGE_BYTES + spare_bytes),
        )
        assert (plan.kv_pages, plan.copy_bytes) == (9, copy_bytes)
