"""The choice of the attention kernels' tiles by the shape of a step."""

import pytest

from pallas_kernels.paged_attention.tiles import PROGRAMS, attention_tiles


def choose(*, tokens=1, decodes=1, heads=32, kv_heads=32, request_tokens=2048, itemsize=2):
    return attention_tiles(
        tokens=tokens,
        decodes=decodes,
        heads=heads,
        kv_heads=kv_heads,
        request_tokens=request_tokens,
        itemsize=itemsize,
    )


@pytest.mark.parametrize(("decodes", "kv_heads"), [(8, 32), (32, 32), (7, 40), (64, 4)])
def test_rows_that_fill_the_gpu_are_not_split(decodes, kv_heads):
    assert choose(decodes=decodes, kv_heads=kv_heads).decode.splits == 1


@pytest.mark.parametrize(("decodes", "kv_heads"), [(1, 32), (2, 40), (8, 4)])
def test_few_rows_are_split_to_fill_the_gpu(decodes, kv_heads):
    splits = choose(decodes=decodes, kv_heads=kv_heads).decode.splits
    assert abs(splits * decodes * kv_heads / PROGRAMS - 1) < 0.1


def test_short_requests_are_not_cut_to_pieces():
    assert choose(heads=28, kv_heads=4, request_tokens=256).decode.splits == 2


def test_a_block_holds_all_heads_of_a_group():
    for heads in (70, 128):
        assert choose(heads=heads, kv_heads=1).chunk.rows >= heads
    assert choose(heads=70, kv_heads=1, itemsize=4).chunk.rows >= 70
