"""The LoRA operator against a NumPy reference: mixed ranks, branches, parts, layers, bad shapes."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from pallas_kernels import lora_matmul as op
from pallas_kernels.lora_matmul import reference

LAYERS, PAGES, SLOTS, D = 2, 6, 4, 40
WIDTHS = (24, 8)  # of the linears that share an input
E = sum(WIDTHS)
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
# y is rounded to bf16 once, and h once a page: a few units of 8 significant bits.
BFLOAT16 = {"rtol": 2**-5, "atol": 2**-5}

# Adapter of each row, pages of each slot, the slot that is folded into the base product.
CASES = {
    "nobody_has_an_adapter": ([-1, -1, -1], {}, -1),
    "one_adapter": ([1, 1, 1, 1], {1: [3]}, -1),
    "base_rows_between": ([1, -1, 1, -1], {1: [3]}, -1),
    "mixed_ranks_unsorted": ([2, 1, 0, -1, 2, 1], {0: [5], 1: [1], 2: [2, 4]}, -1),
    "tiles_of_one_adapter": ([1] * 5 + [2] * 6, {1: [3], 2: [2, 4]}, -1),
    "an_adapter_without_pages": ([1, 0], {1: [3]}, -1),
    "one_row": ([3], {3: [1, 2, 3]}, -1),
    "mixture": ([2, 1, -1, 1, 1, 0], {0: [5], 1: [3], 2: [2, 4]}, 1),
    "all_merged": ([1, 1, 1], {1: [3]}, 1),
}


def make_pool(pages_of, *, width: int, dtype):
    keys = jax.random.split(jax.random.key(width), 3)
    rows = LAYERS * PAGES * op.PAGE_RANKS
    page_SW = np.full((SLOTS, PAGES), 999)  # beyond a slot's pages, nothing is read
    for slot, pages in pages_of.items():
        page_SW[slot, : len(pages)] = pages
    return op.LoraPool(
        a_RD=jax.random.normal(keys[0], (rows, D), dtype) / D**0.5,
        b_RE=jax.random.normal(keys[1], (rows, width), dtype) / 4,
        scale_LS=jax.random.uniform(keys[2], (LAYERS, SLOTS)),
        page_SW=jnp.asarray(page_SW, jnp.int32),
        pages_S=jnp.asarray([len(pages_of.get(slot, ())) for slot in range(SLOTS)], jnp.int32),
    )


def make_parts(pages_of, dtype=jnp.float32):
    return [
        op.Part(pool=make_pool(pages_of, width=width, dtype=dtype), column=column)
        for width, column in zip(WIDTHS, (0, WIDTHS[0]), strict=True)
    ]


def make_rows(rows: int, dtype=jnp.float32):
    kx, ky = jax.random.split(jax.random.key(1))
    return jax.random.normal(kx, (rows, D), dtype), jax.random.normal(ky, (rows, E), dtype)


def tiles_of(adapters, merged: int = -1, block_rows: int = 4):
    adapter_T = jnp.asarray(adapters, jnp.int32)
    return op.RowTiles.of(adapter_T, merged=merged, block_rows=block_rows)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, FLOAT32), (jnp.bfloat16, BFLOAT16)])
@pytest.mark.parametrize(("adapters", "pages_of", "merged"), CASES.values(), ids=CASES.keys())
def test_every_row_gets_its_own_adapter(adapters, pages_of, merged, dtype, tolerance):
    x_TD, y_TE = make_rows(len(adapters), dtype)
    parts, tiles = make_parts(pages_of, dtype), tiles_of(adapters, merged)
    for layer in range(LAYERS):
        got_TE = op.lora_matmul(y_TE, x_TD, parts, tiles=tiles, layer=layer, implementation="xla")
        want_TE = reference.lora_matmul(
            y_TE, x_TD, parts, adapter_T=adapters, merged=merged, layer=layer
        )
        np.testing.assert_allclose(np.float32(got_TE), want_TE, **tolerance)


@pytest.mark.parametrize("merged", [-1, 2])
@pytest.mark.parametrize("block_rows", [4, 64])
def test_prompts_behind_decodes_and_uneven_ranks(block_rows, merged):
    adapters = [0, 1, 1, 2, -1, *[3] * 30, *[1] * 2, *[2] * 45]
    x_TD, y_TE = make_rows(len(adapters))
    ranks = {0: [1], 1: [], 2: [2, 4, 3], 3: [5, 1, 3, 2, 4]}, {0: [3, 2], 1: [4], 3: [1]}
    parts = [
        op.Part(pool=make_pool(pages_of, width=width, dtype=jnp.float32), column=column)
        for pages_of, width, column in zip(ranks, WIDTHS, (0, WIDTHS[0]), strict=True)
    ]
    tiles = tiles_of(adapters, merged, block_rows)
    got_TE = op.lora_matmul(y_TE, x_TD, parts, tiles=tiles, layer=1, implementation="xla")
    want_TE = reference.lora_matmul(y_TE, x_TD, parts, adapter_T=adapters, merged=merged, layer=1)
    np.testing.assert_allclose(got_TE, want_TE, **FLOAT32)


def test_columns_of_no_part_stay_as_they_are():
    x_TD, y_TE = make_rows(3)
    for part in make_parts({1: [3]}):
        got_TE = op.lora_matmul(
            y_TE, x_TD, [part], tiles=tiles_of([1, 1, 1]), layer=0, implementation="xla"
        )
        changed_E = np.asarray(got_TE != y_TE).any(axis=0)
        mine_E = np.zeros(E, bool)
        mine_E[part.column : part.column + part.pool.b_RE.shape[1]] = True
        np.testing.assert_array_equal(changed_E, mine_E)


@given(
    adapters=st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=20),
    merged=st.integers(-1, SLOTS - 1),
    block_rows=st.sampled_from([1, 2, 4, 16]),
)
def test_tiles_cover_each_row_once_those_with_work_first(adapters, merged, block_rows):
    tiles = jax.tree.map(np.asarray, tiles_of(adapters, merged, block_rows))
    covered = []
    for m in range(tiles.count + tiles.idle):
        first, length = tiles.first_M[m], tiles.len_M[m]
        assert 1 <= length <= block_rows
        assert set(adapters[first : first + length]) == {tiles.plus_M[m]}
        assert tiles.minus_M[m] == merged
        covered += range(first, first + length)
    works_T = [a != merged and (a >= 0 or merged >= 0) for a in adapters]
    assert covered == sorted(range(len(adapters)), key=lambda t: (not works_T[t], t))
    assert tiles.len_M[: tiles.count].sum() == sum(works_T)


def test_sorted_rows_make_the_fewest_tiles():
    adapters = [-1] * 3 + [0] * 9 + [2] * 4
    assert int(tiles_of(adapters, block_rows=4).count) == 3 + 1


def test_one_executable_serves_any_number_of_pages_and_tiles():
    traces = 0

    @jax.jit
    def run(x_TD, parts, adapter_T, merged):
        nonlocal traces
        traces += 1
        y_TE = jnp.zeros((x_TD.shape[0], E))
        tiles = op.RowTiles.of(adapter_T, merged=merged, block_rows=4)
        parts = [op.Part(pool=pool, column=c) for pool, c in zip(parts, (0, 24), strict=True)]
        return op.lora_matmul(y_TE, x_TD, parts, tiles=tiles, layer=0, implementation="xla")

    for pages_of, adapters in (({}, [-1, -1]), ({1: [1]}, [1, 1]), ({1: [1, 2], 2: [3]}, [2, 1])):
        pools = [part.pool for part in make_parts(pages_of)]
        run(make_rows(2)[0], pools, jnp.asarray(adapters, jnp.int32), -1)
    assert traces == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x_TD=jnp.ones((3, D + 1))), f"inputs of width {D}, x_TD has {D + 1}"),
        (dict(x_TD=jnp.ones((2, D))), "row counts differ: x_TD has 2, y_TE 3"),
        (dict(tiles=tiles_of([0, 0])), "row counts differ: x_TD has 3, the row tiles 2"),
        (dict(y_TE=jnp.zeros((3, E - 1))), f"columns 24:{E} of a part exceed y_TE's {E - 1}"),
        (
            dict(parts=[make_parts({})[0], dataclasses.replace(make_parts({})[1], column=20)]),
            "parts overlap: columns 0:24 and 20:",
        ),
        (dict(layer=LAYERS), r"layer=2 is not in \[0, 2\)"),
        (dict(implementation="cuda"), "unknown implementation 'cuda'"),
    ],
)
def test_contradicting_arguments_are_refused(change, message):
    args = dict(
        y_TE=jnp.zeros((3, E)),
        x_TD=jnp.ones((3, D)),
        parts=make_parts({}),
        tiles=tiles_of([0, 0, 0]),
        layer=0,
        implementation="xla",
    )
    with pytest.raises(ValueError, match=message):
        op.lora_matmul(**(args | change))
