import dataclasses

import pytest

from valora_jax.config import EngineConfig


def test_the_defaults_are_within_their_own_limits():
    assert EngineConfig() == EngineConfig()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_requests", 0),
        ("max_waiting", 0),
        ("max_tokens_per_step", 0),
        ("steps_ahead", 0),
        ("max_request_tokens", 1),
        ("page_tokens", 0),
        ("kv_pages", 1),
        ("image_slots", 0),
        ("max_adapters", -1),
        ("lora_pages", 0),
        ("projector_lora_pages", 0),
        ("max_replaced_heads", -1),
        ("max_classes", -1),
        ("host_adapter_bytes", -1),
        ("memory_fraction", 0.0),
        ("memory_fraction", 1.01),
        ("memory_fraction", float("nan")),
        ("max_wait_s", float("nan")),
        ("max_wait_s", float("inf")),
        ("lora_pages", float("nan")),
    ],
)
def test_a_size_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"the engine's settings are wrong:\n.*{field}={value} "):
        EngineConfig(**{field: value})


def test_a_step_holds_a_token_of_every_request():
    assert EngineConfig(max_requests=8, max_tokens_per_step=8)
    with pytest.raises(ValueError, match=r"max_requests=9 exceeds max_tokens_per_step=8"):
        EngineConfig(max_requests=9, max_tokens_per_step=8)


def test_every_fault_is_listed_at_once():
    with pytest.raises(ValueError, match="settings are wrong") as error:
        EngineConfig(page_tokens=0, memory_fraction=2, image_slots=-3)
    for part in ("page_tokens=0 must be at least 1", "image_slots=-3", "memory_fraction=2 is not"):
        assert part in str(error.value)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().seed = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dtype="bf16"), r"dtype='bf16' is not one of auto, float32, bfloat16, float16"),
        (dict(kernels="cuda"), r"kernels='cuda' is not one of auto, triton, xla"),
        (dict(policy="merge"), r"policy='merge' is not one of valora, unmerged, merged, dlora"),
        (dict(merge="of"), r"merge='of' is not one of copy, off"),
        (dict(policy="merged", merge="off"), r"would serve one adapter at a time for nothing"),
        (dict(max_wait_s=0), r"max_wait_s=0 must be positive"),
    ],
)
def test_names_are_known_and_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**changes)
