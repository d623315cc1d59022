"""The LoRA kernels for NVIDIA GPUs, interpreted, against the NumPy reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lora_matmul as op
from pallas_kernels.lora_matmul import reference
from pallas_kernels.lora_matmul.tiles import ExpandTile, LoraTile, ShrinkTile
from tests.pallas_kernels.hopper import interpret_kernels

LAYERS, PAGES, SLOTS = 2, 8, 4
LAYER = 1
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
# y is rounded to bf16 once, and h once: a few units of 8 significant bits.
BFLOAT16 = {"rtol": 2**-5, "atol": 2**-5}
FLOAT16 = {"rtol": 2**-8, "atol": 2**-8}  # the same with 11 bits
TOLERANCES = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}

# Few programs that share row tiles and ranks unevenly, several steps of each loop, a last split
# of fewer steps.
TILE = LoraTile(
    block_rows=16,
    row_programs=2,
    shrink=ShrinkTile(block_k=16, block_ranks=16, rank_programs=2, splits=2, warps=4, stages=2),
    expand=ExpandTile(block_columns=16, blocks=2, block_ranks=16, warps=4, stages=2),
)

# Adapter of each row, pages of each slot, the slot that is folded into the base product.
CASES = {
    "nobody_has_an_adapter": ([-1, -1, -1], {0: [1]}, -1),
    "ranks_of_16_to_64_unsorted": (
        [2, 1, 0, -1, 2, 1],
        {0: [5], 1: [1, 7, 6, 3], 2: [4, 2]},
        -1,
    ),
    "base_rows_between_long_runs": ([1] * 20 + [-1] * 3 + [2] * 5, {1: [3], 2: [4, 2]}, -1),
    "an_adapter_without_pages": ([1, 0], {1: [3]}, -1),
    "both_branches": ([2, 1, -1, 1, 0, 0], {0: [5, 6], 1: [3], 2: [2, 4, 7]}, 1),
    "all_merged": ([1, 1, 1], {1: [3]}, 1),
}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    interpret_kernels(monkeypatch)


def make_part(pages_of, *, width: int, columns: int, column: int, dtype) -> op.Part:
    keys = jax.random.split(jax.random.key(columns), 3)
    rows = LAYERS * PAGES * op.PAGE_RANKS
    most = max(map(len, pages_of.values()), default=1)
    page_SW = np.full((SLOTS, most), 999)  # beyond a slot's pages, nothing is read
    for slot, pages in pages_of.items():
        page_SW[slot, : len(pages)] = pages
    pool = op.LoraPool(
        a_RD=jax.random.normal(keys[0], (rows, width), dtype) / width**0.5,
        b_RE=jax.random.normal(keys[1], (rows, columns), dtype) / 4,
        scale_LS=jax.random.uniform(keys[2], (LAYERS, SLOTS)),
        page_SW=jnp.asarray(page_SW, jnp.int32),
        pages_S=jnp.asarray([len(pages_of.get(slot, ())) for slot in range(SLOTS)], jnp.int32),
    )
    return op.Part(pool=pool, column=column)


def make_rows(rows: int, width: int, columns: int, dtype):
    kx, ky = jax.random.split(jax.random.key(1))
    x_TD = jax.random.normal(kx, (rows, width), dtype)
    return x_TD, jax.random.normal(ky, (rows, columns), dtype)


def check(parts, x_TD, y_TE, adapters, *, merged=-1, tile: LoraTile | None = TILE, height=16):
    """Multiplies and compares; returns the result."""
    tiles = op.RowTiles.of(jnp.asarray(adapters, jnp.int32), merged=merged, block_rows=height)
    got_TE = op.lora_matmul(
        y_TE, x_TD, parts, tiles=tiles, layer=LAYER, implementation="triton", tile=tile
    )
    want_TE = reference.lora_matmul(
        y_TE, x_TD, parts, adapter_T=adapters, merged=merged, layer=LAYER
    )
    assert got_TE.dtype == y_TE.dtype
    np.testing.assert_allclose(np.float32(got_TE), want_TE, **TOLERANCES[x_TD.dtype.name])
    return got_TE


@pytest.mark.parametrize(
    ("dtype", "block_ranks"),  # ranks step by step, and most of them at once
    [(jnp.float32, 16), (jnp.bfloat16, 64)],
)
@pytest.mark.parametrize(("adapters", "pages_of", "merged"), CASES.values(), ids=CASES.keys())
def test_every_row_gets_its_own_adapter(adapters, pages_of, merged, dtype, block_ranks):
    # Widths that no block divides; the second part serves fewer adapters than the first.
    x_TD, y_TE = make_rows(len(adapters), 40, 24 + 16, dtype)
    of_second = {slot: pages[:1] for slot, pages in pages_of.items() if slot != 2}
    parts = [
        make_part(pages_of, width=40, columns=24, column=0, dtype=dtype),
        make_part(of_second, width=40, columns=16, column=24, dtype=dtype),
    ]
    expand = dataclasses.replace(TILE.expand, block_ranks=block_ranks)
    tile = dataclasses.replace(TILE, expand=expand)
    check(parts, x_TD, y_TE, adapters, merged=merged, tile=tile)


def make_linear(dtype=jnp.float32, pool_dtype=None):
    """Seven rows of three adapters, one linear 40 -> 24 in the middle of 40 columns."""
    adapters = [0, 0, 1, -1, 2, 2, 2]
    part = make_part(
        {0: [5], 1: [1, 7, 6, 3], 2: [4, 2]},
        width=40,
        columns=24,
        column=8,
        dtype=pool_dtype or dtype,
    )
    return [part], *make_rows(len(adapters), 40, 40, dtype), adapters


def test_rows_and_columns_of_nobody_keep_their_bits():
    # What is added is NaN where the interpreted kernel does not write.
    parts, x_TD, y_TE, adapters = make_linear(jnp.bfloat16)
    got_TE = np.asarray(check(parts, x_TD, y_TE, adapters))
    changed_TE = got_TE != np.asarray(y_TE)
    assert changed_TE[:, 8:32].any(axis=1).tolist() == [a >= 0 for a in adapters]
    assert not changed_TE[:, :8].any()
    assert not changed_TE[:, 32:].any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_may_be_float32_as_logits_are(dtype):
    parts, x_TD, y_TE, adapters = make_linear(dtype)
    check(parts, x_TD, y_TE.astype(jnp.float32), adapters)


def test_weights_are_cast_to_the_dtype_of_the_rows():
    check(*make_linear(jnp.bfloat16, pool_dtype=jnp.float32))


def test_float16_is_taken():
    check(*make_linear(jnp.float16))


@pytest.mark.parametrize(
    "shrink",
    [
        dict(splits=1),
        dict(splits=3),
        dict(splits=9),  # more than there are steps
        dict(block_k=64),  # wider than the input
        dict(rank_programs=1),
        dict(rank_programs=3),
        dict(block_ranks=32),
        dict(block_ranks=64),
    ],
    ids=str,
)
def test_any_cut_gives_the_same(shrink):
    tile = dataclasses.replace(TILE, shrink=dataclasses.replace(TILE.shrink, **shrink))
    check(*make_linear(), tile=tile)


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_any_number_of_programs_shares_the_row_tiles(programs):
    check(*make_linear(), tile=dataclasses.replace(TILE, row_programs=programs))


@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
def test_any_number_of_blocks_of_columns_of_a_program(blocks):
    expand = dataclasses.replace(TILE.expand, blocks=blocks)
    check(*make_linear(), tile=dataclasses.replace(TILE, expand=expand))


def test_what_is_not_finite_stays_in_its_row():
    parts, x_TD, y_TE, adapters = make_linear()
    tiles = op.RowTiles.of(jnp.asarray(adapters, jnp.int32), block_rows=16)
    how = dict(tiles=tiles, layer=LAYER, implementation="triton", tile=TILE)
    want_TE = op.lora_matmul(y_TE, x_TD, parts, **how)
    got_TE = op.lora_matmul(y_TE, x_TD.at[1].set(jnp.inf), parts, **how)
    others = np.arange(len(adapters)) != 1
    np.testing.assert_array_equal(got_TE[others], want_TE[others])


def test_the_expand_may_take_more_ranks_at_once_than_the_shrink():
    expand = dataclasses.replace(TILE.expand, block_ranks=64, block_columns=32)
    check(*make_linear(), tile=dataclasses.replace(TILE, expand=expand))


@pytest.mark.parametrize("height", [1, 3, 16])
def test_row_tiles_may_be_lower_than_the_default_tile(height):
    check(*make_linear(), tile=None, height=height)


def test_dtypes_that_the_kernels_do_not_take_name_the_way_out():
    parts, x_TD, y_TE, adapters = make_linear()
    for x, y in ((x_TD, y_TE.astype(jnp.bfloat16)), (x_TD.astype(int), y_TE)):
        with pytest.raises(NotImplementedError, match='cast it or use implementation="xla"'):
            check(parts, x, y, adapters)


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (TILE, r"row tiles of 32 rows exceed the kernels' 16: make them with RowTiles\.of"),
        (dataclasses.replace(TILE, block_rows=48), "block_rows=48 is not a power of two"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(tile, message):
    with pytest.raises(ValueError, match=message):
        check(*make_linear(), tile=tile, height=32)
