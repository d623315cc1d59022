"""Merging against a NumPy reference: odd sizes, several pages, absent parts, one rounding."""

import contextlib
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

from pallas_kernels.lora_matmul.api import Part
from pallas_kernels.lora_matmul.layout import PAGE_RANKS, LoraPool
from pallas_kernels.lora_merge import (
    MergeTile,
    fastest,
    lora_merge,
    mosaic,
    reference,
    triton,
    xla,
)
from tests.pallas_kernels.hopper import (
    interpret_kernels,
    launches,
    lower_for_hopper,
    mosaic_kernels,
)

LAYERS, SLOTS = 2, 4
TILE = MergeTile(block_d=16, block_e=16, blocks=2, pages=2, warps=4, stages=2)
# Half a unit in the last place, which one rounding of an exact sum may be off; float32 products
# round in between, and sums of either dtype do so near the half.
TOLERANCE = {
    "float32": dict(rtol=1e-6, atol=1e-5),
    "bfloat16": dict(rtol=2**-8, atol=1e-5),
    "float16": dict(rtol=2**-11, atol=1e-5),
}
# What each slot owns. Page 7 is full of infinity, and nobody's: it must not be multiplied.
PAGES_OF_SLOT = ([5], [], [1, 3, 6, 2, 4, 5], [2, 4])
PAGES = 8
CASES = {  # D, E, (first column, width) of each part
    "one_linear": (32, 48, [(0, 48)]),
    "odd_sizes": (40, 23, [(0, 23)]),
    "fused": (24, 56, [(0, 24), (24, 16), (40, 16)]),
    "gaps_between_parts": (24, 60, [(5, 20), (30, 16)]),
    "no_part": (24, 20, []),
}
HOPPER_CASES = {
    "one_linear": (64, 128, [(0, 128)]),
    "more_blocks_than_slots": (512, 128, [(0, 128)]),
    "fused": (64, 512, [(0, 256), (256, 128), (384, 128)]),
    "gaps_between_parts": (128, 448, [(64, 64), (192, 192)]),
}


def make_pool(key, D, E, dtype, pages_of_slot=PAGES_OF_SLOT):
    keys = jax.random.split(key, 3)
    a_LPrD = jax.random.normal(keys[0], (LAYERS, PAGES, PAGE_RANKS, D), dtype) / 4
    b_LPrE = jax.random.normal(keys[1], (LAYERS, PAGES, PAGE_RANKS, E), dtype) / 4
    page_SW = np.full((SLOTS, 6), 7)  # past a slot's own; a block of pages reaches there
    for slot, pages in enumerate(pages_of_slot):
        page_SW[slot, : len(pages)] = pages
    return LoraPool(
        a_RD=a_LPrD.at[:, 0].set(0).at[:, 7].set(jnp.inf).reshape(-1, D),
        b_RE=b_LPrE.at[:, 0].set(0).at[:, 7].set(jnp.inf).reshape(-1, E),
        scale_LS=jax.random.uniform(keys[2], (LAYERS, SLOTS)),
        page_SW=jnp.asarray(page_SW, jnp.int32),
        pages_S=jnp.asarray([*map(len, pages_of_slot)], jnp.int32),
    )


def make_case(case, dtype):
    D, E, columns = case
    keys = jax.random.split(jax.random.key(0), 1 + len(columns))
    base_DE = jax.random.normal(keys[0], (D, E), dtype)
    parts = [
        Part(pool=make_pool(key, D, width, dtype), column=column)
        for key, (column, width) in zip(keys[1:], columns, strict=True)
    ]
    return base_DE, parts


@pytest.fixture
def merge(monkeypatch):
    """`lora_merge` into a copy full of NaN, interpreted if need be."""
    interpret_kernels(monkeypatch)

    def merge(base_DE, parts, merged_DE=None, **how):
        merged_DE = jnp.full_like(base_DE, jnp.nan) if merged_DE is None else merged_DE
        mosaic_alone = how["implementation"] == "mosaic"
        with mosaic_kernels() if mosaic_alone else contextlib.nullcontext():
            return lora_merge(merged_DE, base_DE, parts, **how, tile=TILE)

    return merge


@pytest.mark.parametrize(
    ("implementation", "case", "dtype"),
    [
        (anywhere, *of)
        for anywhere in ("xla", "triton")
        for of in itertools.product(CASES, TOLERANCE)
    ]
    + [("mosaic", case, "bfloat16") for case in HOPPER_CASES]
    + [("mosaic", "one_linear", "float16")],
)
def test_every_slot_and_layer_is_added_with_one_rounding(implementation, case, dtype, merge):
    cases = HOPPER_CASES if implementation == "mosaic" else CASES
    base_DE, parts = make_case(cases[case], dtype)
    for layer, slot in ((0, 0), (1, 1), (1, 2), (0, 3)):
        where = dict(layer=layer, slot=slot)
        got_DE = merge(base_DE, parts, **where, implementation=implementation)
        want_DE = reference.lora_merge(base_DE, parts, **where)
        assert got_DE.dtype == base_DE.dtype
        np.testing.assert_allclose(np.float64(got_DE), want_DE, **TOLERANCE[dtype])
        if implementation == "mosaic" and jax.default_backend() != "gpu":
            assert not interpreter.get_races().races_found


@pytest.mark.parametrize("implementation", ["xla", "triton", "mosaic"])
def test_a_part_that_the_adapter_lacks_is_copied(implementation, merge):
    base_DE = jax.random.normal(jax.random.key(1), (64, 192), jnp.bfloat16)
    lacking = make_pool(jax.random.key(2), 64, 64, jnp.bfloat16, ([1], [], [], [2]))
    having = make_pool(jax.random.key(3), 64, 128, jnp.bfloat16)
    parts = [Part(pool=lacking, column=0), Part(pool=having, column=64)]
    got_DE = np.float32(merge(base_DE, parts, layer=0, slot=2, implementation=implementation))
    np.testing.assert_array_equal(got_DE[:, :64], np.float32(base_DE[:, :64]))
    assert np.mean(got_DE[:, 64:] != np.float32(base_DE[:, 64:])) > 0.9


@pytest.mark.parametrize("implementation", ["xla", "triton", "mosaic"])
def test_the_copy_is_filled_in_place_by_one_executable(implementation, merge):
    base_DE, parts = make_case(HOPPER_CASES["fused"], jnp.bfloat16)
    merged_DE = jnp.zeros_like(base_DE)
    where = merged_DE.unsafe_buffer_pointer()
    jax.clear_caches()
    for layer in range(LAYERS):
        at = dict(layer=layer, slot=2 + layer)
        merged_DE = merge(base_DE, parts, merged_DE, **at, implementation=implementation)
        assert merged_DE.unsafe_buffer_pointer() == where
    assert sum(way.lora_merge._cache_size() for way in (xla, triton, mosaic)) == 1


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        (CASES["no_part"], "bfloat16", "there are no parts"),
        (HOPPER_CASES["fused"], "float32", "the weights are float32"),
        ((40, 64, [(0, 64)]), "bfloat16", "D=40 is no multiple of 64; use 'triton' or 'xla'"),
        ((64, 128, [(32, 64)]), "bfloat16", "parts or gaps .* no multiples of 64 columns"),
    ],
)
def test_mosaic_refuses_what_triton_then_merges(case, dtype, message, merge, monkeypatch):
    base_DE, parts = make_case(case, dtype)
    with pytest.raises(NotImplementedError, match=message):
        merge(base_DE, parts, layer=0, slot=0, implementation="mosaic")
    hopper = SimpleNamespace(compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [hopper])
    assert fastest(base_DE, parts) == "triton"


@pytest.mark.parametrize(
    ("capability", "implementation"), [("8.0", "triton"), ("9.0", "mosaic"), (None, "xla")]
)
def test_the_device_decides_what_is_fastest(capability, implementation, monkeypatch):
    base_DE, parts = make_case(HOPPER_CASES["fused"], "bfloat16")
    device = SimpleNamespace(**({"compute_capability": capability} if capability else {}))
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert fastest(base_DE, parts) == implementation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(merged_DE=jnp.zeros((24, 55))), r"the copy is float32\[24, 55\], the base"),
        (dict(layer=2), r"layer=2 is not in \[0, 2\)"),
        (dict(slot=4), r"slot=4 is not in \[0, 4\)"),
        (dict(implementation="cuda"), "unknown implementation 'cuda'"),
    ],
)
def test_contradicting_arguments_are_refused(change, message):
    base_DE, parts = make_case(CASES["fused"], jnp.float32)
    args = dict(merged_DE=jnp.zeros_like(base_DE), base_DE=base_DE, parts=parts, layer=0, slot=0)
    with pytest.raises(ValueError, match=message):
        lora_merge(**(args | {"implementation": "xla"} | change))


def test_parts_that_do_not_fit_are_refused():
    base_DE, parts = make_case(CASES["fused"], jnp.float32)
    merged_DE = jnp.zeros_like(base_DE)
    args = dict(layer=0, slot=0, implementation="xla")
    with pytest.raises(ValueError, match="columns 0:24 of a part are not within 40:56"):
        lora_merge(merged_DE, base_DE, parts[::-1][1:] + parts[:1], **args)
    with pytest.raises(ValueError, match="inputs of width 24, base_DE has 8"):
        lora_merge(merged_DE[:8], base_DE[:8], parts, **args)
    with pytest.raises(NotImplementedError, match="int8 is not merged"):
        lora_merge(merged_DE.astype("int8"), base_DE.astype("int8"), parts, **args)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (dict(block_e=48), "block_e=48 is not a power of two"),
        (dict(block_d=8), "blocks of 8 x 16 are smaller"),
        (dict(stages=0), "stages=0 is not at least 1"),
    ],
)
def test_impossible_tiles_are_refused(field, message):
    shape = dict(block_d=16, block_e=16, blocks=1, pages=2, warps=4, stages=2)
    with pytest.raises(ValueError, match=message):
        MergeTile(**(shape | field))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("D", "widths"),
    [
        (4096, (4096, 4096, 4096)),
        (11008, (4096,)),
        (5120, (13824, 13824)),
        (3584, (3584, 512, 512)),
        (40, (23, 8)),
    ],
    ids=["7b_qkv", "7b_down", "13b_gate_up", "qwen25_qkv", "odd"],
)
def test_the_default_tile_lowers_for_hopper(D, widths, dtype):
    def merge(merged_DE, base_DE, pools):
        columns = np.cumsum([0, *widths[:-1]]).tolist()
        parts = [Part(pool=pool, column=c) for pool, c in zip(pools, columns, strict=True)]
        return lora_merge(merged_DE, base_DE, parts, layer=1, slot=2, implementation="triton")

    weights = jax.ShapeDtypeStruct((D, sum(widths)), dtype)
    make = functools.partial(make_pool, jax.random.key(0))
    pools = [jax.eval_shape(functools.partial(make, D, width, dtype)) for width in widths]
    assert launches(lower_for_hopper(merge, weights, weights, pools)) == 1
