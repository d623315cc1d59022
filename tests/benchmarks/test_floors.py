"""The floors' arithmetic, against figures worked out by hand."""

import pytest

from benchmarks import floors
from benchmarks.floors import Work
from pallas_kernels.tuning.shapes import MODELS


def test_a_floor_is_the_slower_of_bytes_and_products():
    assert Work(bytes=3.0e12, flops=0).floor_ms == pytest.approx(1000)
    assert Work(bytes=3.0e12, flops=2 * 989e12).floor_ms == pytest.approx(2000)


@pytest.mark.parametrize(
    ("tokens", "adapters", "microseconds"), [(8, 8, 2.84), (32, 32, 11.36), (4096, 8, 25.2)]
)
def test_lora_reads_each_adapter_and_row_once(tokens, adapters, microseconds):
    work = floors.lora(tokens=tokens, ranks=(64,) * adapters, width=4096, columns=(4096,))
    assert 1e3 * work.floor_ms == pytest.approx(microseconds, rel=0.02)


def test_products_follow_the_share_of_tokens_that_each_adapter_has():
    work = floors.adapters(tokens=10, ranks=(8, 24), width=100, columns=(50, 50))
    assert work.flops == 2 * 5 * (8 + 24) * (2 * 100 + 100)
    assert work.bytes == 2 * (8 + 24) * (2 * 100 + 100)


def test_a_base_model_has_no_adapters_to_read():
    assert floors.adapters(tokens=10, ranks=(), width=100, columns=(50,)) == Work(0, 0)


def test_attention_counts_pairs_under_the_mask():
    heads = dict(heads=4, kv_heads=2, head_width=8)
    prompt = floors.attention(tokens=3, kv_tokens=5, requests=2, **heads)
    assert prompt.flops == 2 * 4 * (3 + 4 + 5) * 4 * 8
    # Cached keys and values are read, new ones and the queries too; keys, values and out written.
    assert prompt.bytes == 2 * 2 * 8 * (2 * 2 * 2 + 3 * (2 * 4 + 4 * 2))


def test_a_merge_of_a_whole_7b_takes_what_its_weights_take_twice():
    shape = MODELS["llava-1.5-7b"]
    linears = shape.linears.values()
    layer = [floors.merge(rank=64, width=d, columns=sum(e)) for d, e in linears]
    assert (sum(layer, Work(0, 0)) * shape.layers).floor_ms == pytest.approx(8.7, rel=0.02)


def test_a_decode_step_of_a_7b_reads_weights_and_cache():
    shape = MODELS["llava-1.5-7b"]
    weights = sum(d * sum(e) for d, e in shape.linears.values()) * shape.layers + 4096 * 32064
    attention = floors.attention(
        tokens=1, kv_tokens=800, requests=8, heads=32, kv_heads=32, head_width=128
    )
    work = floors.linear(tokens=8, weights=weights) + attention * shape.layers
    assert work.floor_ms == pytest.approx(5.52, rel=0.01)
