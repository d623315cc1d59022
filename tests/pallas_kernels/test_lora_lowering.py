"""The LoRA kernels lower for an H100 at the sizes of a 7B model, and their tiles are legal."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import lora_matmul as op
from pallas_kernels.lora_matmul import tiles
from tests.pallas_kernels.hopper import launches, lower_for_hopper

LAYERS, PAGES, SLOTS = 32, 256, 33
LEGAL = tiles.lora_tile(rows=8, width=4096, columns=4096)

# Input width, output widths of the linears that share it.
LINEARS = {
    "qkv": (4096, (4096, 4096, 4096)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (11008, 11008)),
    "down": (11008, (4096,)),
}


def pool_shapes(width: int, columns: int, dtype) -> op.LoraPool:
    rows = LAYERS * PAGES * op.PAGE_RANKS
    return op.LoraPool(
        a_RD=jax.ShapeDtypeStruct((rows, width), dtype),
        b_RE=jax.ShapeDtypeStruct((rows, columns), dtype),
        scale_LS=jax.ShapeDtypeStruct((LAYERS, SLOTS), jnp.float32),
        page_SW=jax.ShapeDtypeStruct((SLOTS, PAGES), jnp.int32),
        pages_S=jax.ShapeDtypeStruct((SLOTS,), jnp.int32),
    )


def columns_of(widths: tuple[int, ...]) -> tuple[int, ...]:
    """First column of each linear, side by side."""
    return tuple(sum(widths[:i]) for i in range(len(widths)))


def lower(rows: int, width: int, widths: tuple[int, ...], *, dtype=jnp.bfloat16, layers: int = 1):
    def add(y_TE, x_TD, pools, adapter_T):
        row_tiles = op.RowTiles.of(adapter_T, block_rows=tiles.block_rows(rows))
        places = zip(pools, columns_of(widths), strict=True)
        parts = [op.Part(pool=pool, column=column) for pool, column in places]
        for layer in range(layers):
            y_TE = op.lora_matmul(
                y_TE, x_TD, parts, tiles=row_tiles, layer=layer, implementation="triton"
            )
        return y_TE

    return lower_for_hopper(
        add,
        jax.ShapeDtypeStruct((rows, sum(widths)), dtype),
        jax.ShapeDtypeStruct((rows, width), dtype),
        [pool_shapes(width, columns, dtype) for columns in widths],
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )


@pytest.mark.parametrize("rows", [1, 8, 128, 4096])
@pytest.mark.parametrize(("width", "widths"), LINEARS.values(), ids=LINEARS.keys())
def test_linears_that_share_an_input_are_two_launches(width, widths, rows):
    assert launches(lower(rows, width, widths)) == 2


def test_partial_sums_have_room_for_two_adapters_of_the_highest_rank_and_no_more():
    splits = LEGAL.shrink.splits
    assert f"tensor<{splits * 8}x{2 * op.MAX_RANK}xf32>" in lower(8, 4096, (4096,))


def test_all_layers_share_one_lowering():
    text = lower(8, 4096, (4096,), layers=3)
    assert launches(text) == 2
    assert text.count("call @lora_update(") == 3


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_other_dtypes_lower_too(dtype):
    assert launches(lower(4096, 4096, (4096,), dtype=dtype)) == 2


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows", [1, 8, 64, 65, 255, 256, 1000, 4096, 32768])
@pytest.mark.parametrize(("width", "columns"), [(8, 8), (40, 24), (4096, 12288), (13824, 5120)])
def test_computed_tiles_are_legal(rows, width, columns, itemsize):
    tile = tiles.lora_tile(rows=rows, width=width, columns=columns, itemsize=itemsize)
    assert tiles.refusals(tile, itemsize=itemsize) == []
    assert tile.block_rows == tiles.block_rows(rows)


def test_splits_follow_the_device():
    shape = dict(rows=640, width=11008, columns=4096)
    h100, a100, unknown = (
        tiles.lora_tile(**shape, device=device).shrink.splits
        for device in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA X1")
    )
    assert (h100, a100, unknown) == (3, 2, 3)


@pytest.mark.parametrize(
    ("shrink", "expand", "message"),
    [
        (dict(block_k=96), {}, "block_k=96 is not a power of two of at least 16"),
        (dict(block_ranks=8), {}, "shrink_block_ranks=8 is not a power of two of at least 16"),
        ({}, dict(warps=3), "expand warps=3 is not 1, 2, 4, 8 or 16"),
        (dict(splits=0), {}, "splits=0 is not at least 1"),
        ({}, dict(stages=0), "expand stages=0 is not at least 1"),
        (
            dict(block_k=4096, block_ranks=16, stages=2),
            {},
            "shrink needs about 262144 bytes of shared memory, a program has 232448",
        ),
    ],
)
def test_illegal_tiles_say_why(shrink, expand, message):
    tile = dataclasses.replace(
        LEGAL,
        shrink=dataclasses.replace(LEGAL.shrink, **shrink),
        expand=dataclasses.replace(LEGAL.expand, **expand),
    )
    assert tiles.refusals(tile, itemsize=2) == [message]
