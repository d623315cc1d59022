"""The LoRA kernels for NVIDIA GPUs, interpreted, against the NumPy reference."""

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
TOLERANCES = {jnp.float32: FLOAT32, jnp.bfloat16: BFLOAT16}

# The fewest programs that share work unevenly, several steps of each loop, both kinds of splits.
TILE = LoraTile(
    block_rows=16,
    shrink=ShrinkTile(block_k=16, block_ranks=32, splits=2, warps=4, stages=2, programs=2),
    expand=ExpandTile(block_columns=16, block_ranks=16, warps=4, stages=2, programs=2),
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
    page_SW = np.full((SLOTS, 4), 999)  # beyond a slot's pages, nothing is read
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
    np.testing.assert_allclose(np.float32(got_TE), want_TE, **TOLERANCES[x_TD.dtype.type])
    return got_TE


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("adapters", "pages_of", "merged"), CASES.values(), ids=CASES.keys())
def test_every_row_gets_its_own_adapter(adapters, pages_of, merged, dtype):
    # Widths that no block divides; the second part serves fewer adapters than the first.
    x_TD, y_TE = make_rows(len(adapters), 40, 24 + 16, dtype)
    of_second = {slot: pages[:1] for slot, pages in pages_of.items() if slot != 2}
    parts = [
        make_part(pages_of, width=40, columns=24, column=0, dtype=dtype),
        make_part(of_second, width=40, columns=16, column=24, dtype=dtype),
    ]
    check(parts, x_TD, y_TE, adapters, merged=merged)
