"""The base product with the LoRA expand in one launch: interpreted against NumPy, and lowered."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lora_matmul as op
from pallas_kernels.lora_matmul import reference, tiles_linear, triton_linear
from pallas_kernels.lora_matmul.tiles import ShrinkTile, block_rows
from pallas_kernels.lora_matmul.tiles_linear import LinearTile
from tests.pallas_kernels.hopper import interpret_kernels, launches, lower_for_hopper
from tests.pallas_kernels.test_lora_lowering import LINEARS, columns_of, pool_shapes
from tests.pallas_kernels.test_lora_triton import CASES, FLOAT32, LAYER, TOLERANCES, make_part

WIDTH, COLUMNS = 40, 48  # no block divides the width, nor the parts' 24 and 13 columns
# Several steps of each loop; short lists share a block.
SHRINK = ShrinkTile(block_k=16, block_ranks=16, rank_programs=2, splits=2, warps=4, stages=3)
CUT = LinearTile(
    block_columns=16,
    block_k=16,
    block_ranks=32,
    tile_rows=16,
    row_programs=2,
    splits=2,
    shrink=SHRINK,
)


def make_parts(pages_of, dtype) -> list[op.Part]:
    """Two parts with columns of nobody between and after; the second serves fewer adapters."""
    of_second = {slot: pages[:1] for slot, pages in pages_of.items() if slot != 2}
    return [
        make_part(pages_of, width=WIDTH, columns=24, column=0, dtype=dtype),
        make_part(of_second, width=WIDTH, columns=13, column=30, dtype=dtype),
    ]


def check(
    adapters, pages_of, *, merged=-1, dtype=jnp.float32, cut=CUT, pool_dtype=None, with_bias=False
):
    """Multiplies and compares; returns the result."""
    parts = make_parts(pages_of, pool_dtype or dtype)
    keys = jax.random.split(jax.random.key(len(adapters)), 3)
    x_TD = jax.random.normal(keys[0], (len(adapters), WIDTH), dtype)
    w_DE = jax.random.normal(keys[1], (WIDTH, COLUMNS), dtype) / dtype(WIDTH**0.5)
    bias_E = jax.random.normal(keys[2], (COLUMNS,), dtype) if with_bias else None
    got_TE, arrived, _ = triton_linear.lora_linear(
        x_TD,
        w_DE,
        bias_E,
        tuple(part.pool for part in parts),
        op.RowTiles.of(jnp.asarray(adapters, jnp.int32), merged=merged, block_rows=16),
        np.int32(LAYER),
        jnp.zeros(1, jnp.int32),
        jnp.full(1, 7, jnp.int32),
        columns=tuple(part.column for part in parts),
        cut=cut,
    )
    assert arrived.tolist() == [0]
    base_TE = np.asarray(x_TD, np.float64) @ np.asarray(w_DE, np.float64)
    base_TE += 0 if bias_E is None else np.asarray(bias_E, np.float64)
    want_TE = reference.lora_matmul(
        base_TE, x_TD, parts, adapter_T=adapters, merged=merged, layer=LAYER
    )
    assert got_TE.dtype == dtype
    np.testing.assert_allclose(np.float32(got_TE), want_TE, **TOLERANCES[x_TD.dtype.name])
    return np.asarray(got_TE)


@pytest.fixture
def _interpreted(monkeypatch):
    interpret_kernels(monkeypatch)


@pytest.mark.usefixtures("_interpreted")
class TestValues:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    @pytest.mark.parametrize(("adapters", "pages_of", "merged"), CASES.values(), ids=CASES.keys())
    def test_every_row_gets_its_own_adapter(self, adapters, pages_of, merged, dtype):
        check(adapters, pages_of, merged=merged, dtype=dtype)

    @pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 33, 64])
    def test_any_number_of_rows(self, rows):
        adapters = np.random.default_rng(rows).integers(-1, 3, rows).tolist()
        check(adapters, {0: [5], 1: [1, 7, 6, 3], 2: [4, 2]}, merged=0)

    @pytest.mark.parametrize(
        "cut",
        [
            dict(block_ranks=16),
            dict(block_ranks=64),
            dict(block_k=64),  # wider than the input
            dict(block_columns=32),  # wider than a part
            dict(tile_rows=32),
            dict(row_programs=64),  # more than rows
            dict(splits=1),
            dict(splits=4),  # one has nothing left
            dict(shrink=dataclasses.replace(SHRINK, stages=1)),
            dict(shrink=dataclasses.replace(SHRINK, splits=1, block_ranks=32)),
            dict(shrink=dataclasses.replace(SHRINK, splits=3, rank_programs=1)),
        ],
        ids=str,
    )
    def test_any_cut_gives_the_same(self, cut):
        cut = dataclasses.replace(CUT, **cut)
        check([0, 0, 1, -1, 2, 2, 2], {0: [5], 1: [1, 7, 6, 3], 2: [4, 2]}, cut=cut)

    @pytest.mark.parametrize("splits", [1, 2])
    def test_a_bias_is_added_once(self, splits):
        cut = dataclasses.replace(CUT, splits=splits)
        check([1, -1, 0], {0: [5], 1: [3]}, cut=cut, with_bias=True)

    def test_the_computed_cut(self):
        cut = tiles_linear.linear_tile(rows=3, width=WIDTH, columns=COLUMNS, parts=2, itemsize=4)
        check([2, 1, 1], {1: [1, 7], 2: [4]}, cut=cut)

    def test_weights_are_cast_to_the_dtype_of_the_rows(self):
        check([1, 0], {0: [5], 1: [3]}, dtype=jnp.bfloat16, pool_dtype=jnp.float32)

    def test_float16_is_taken(self):
        check([1, 0], {0: [5], 1: [3]}, dtype=jnp.float16)

    def test_neighbours_change_nothing_of_a_row(self):
        pages_of = {0: [5], 1: [1, 7], 2: [4]}
        alone_TE, beside_TE = (check(rows, pages_of) for rows in ([0, -1, -1], [0, 2, 1]))
        np.testing.assert_array_equal(alone_TE[0], beside_TE[0])

    @pytest.mark.parametrize(
        ("rows", "with_bias"),
        [(7, False), (7, True), (tiles_linear.MAX_ROWS + 1, False)],
        ids=["one_launch", "bias", "more_rows"],
    )
    def test_implementations_agree(self, rows, with_bias):
        parts = make_parts({0: [5], 1: [1, 7, 6, 3], 2: [4, 2]}, jnp.float32)
        keys = jax.random.split(jax.random.key(rows), 4)
        x_TD = jax.random.normal(keys[0], (rows, WIDTH))
        w_DE = jax.random.normal(keys[1], (WIDTH, COLUMNS))
        bias_E = jax.random.normal(keys[2], (COLUMNS,)) if with_bias else None
        tiles = op.RowTiles.of(jax.random.randint(keys[3], (rows,), -1, 3), block_rows=16)
        how = dict(bias_E=bias_E, tiles=tiles, layer=LAYER)
        with jax.default_matmul_precision("highest"):
            got_TE, want_TE = (
                op.lora_linear(x_TD, w_DE, parts, implementation=implementation, **how)
                for implementation in ("triton", "xla")
            )
        # Of the same float32 numbers, whose sums are of another order.
        np.testing.assert_allclose(got_TE, want_TE, **FLOAT32)

    def test_a_cut_that_is_not_legal_is_refused(self):
        with pytest.raises(ValueError, match="block_k=48 is not a power of two"):
            check([0], {0: [5]}, cut=dataclasses.replace(CUT, block_k=48))


def test_weights_of_another_width_are_refused():
    tiles = op.RowTiles.of(jnp.zeros(2, jnp.int32), block_rows=16)
    with pytest.raises(ValueError, match="w_DE is for inputs of width 6, x_TD has 8"):
        op.lora_linear(
            jnp.zeros((2, 8)), jnp.zeros((6, 4)), [], tiles=tiles, layer=0, implementation="xla"
        )


SIZES = LINEARS | {
    "13b_qkv": (5120, (5120, 5120, 5120)),
    "13b_gate_up": (5120, (13824, 13824)),
    "13b_down": (13824, (5120,)),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rows", [1, tiles_linear.MAX_ROWS])
@pytest.mark.parametrize(("width", "widths"), SIZES.values(), ids=SIZES.keys())
def test_linears_that_share_an_input_are_one_launch(width, widths, rows, dtype):
    E = sum(widths)
    how = dict(width=width, columns=E, parts=len(widths), itemsize=jnp.dtype(dtype).itemsize)
    cut = tiles_linear.linear_tile(rows=rows, **how)

    def multiply(x_TD, w_DE, pools, adapter_T):
        return triton_linear.lora_linear(
            x_TD,
            w_DE,
            None,
            pools,
            op.RowTiles.of(adapter_T, block_rows=block_rows(rows)),
            np.int32(0),
            *[jnp.zeros(1, jnp.int32)] * 2,
            columns=columns_of(widths),
            cut=cut,
        )

    text = lower_for_hopper(
        multiply,
        jax.ShapeDtypeStruct((rows, width), dtype),
        jax.ShapeDtypeStruct((width, E), dtype),
        tuple(pool_shapes(width, columns, dtype) for columns in widths),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    assert launches(text) == 2  # the lists, of all layers, and the product with all of LoRA


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows", [1, 33, tiles_linear.MAX_ROWS])
@pytest.mark.parametrize(
    ("width", "columns"),
    [(8, 8), (64, 64), (40, 24), (64, 4096), (4096, 4096), (4096, 12288), (4096, 6144)],
)
def test_computed_cuts_are_legal(width, columns, rows, itemsize):
    how = dict(rows=rows, itemsize=itemsize)
    cut = tiles_linear.linear_tile(width=width, columns=columns, parts=1, **how)
    assert tiles_linear.refusals(cut, **how) == []


@pytest.mark.parametrize(
    ("rows", "columns", "itemsize", "device", "ranges"),
    [
        (33, 4096, 2, "NVIDIA H200", 2),
        (32, 4096, 2, "NVIDIA H200", 1),
        (64, 4096, 4, "NVIDIA H200", 1),  # exact float32 has narrow blocks, and so many programs
        (64, 4096, 2, "NVIDIA A100-SXM4-80GB", 1),  # fewer than two multiprocessors a block
        (64, 5120, 2, "NVIDIA H200", 1),
        (64, 64, 2, "NVIDIA H200", 1),
    ],
)
def test_many_rows_and_few_columns_get_two_ranges(rows, columns, itemsize, device, ranges):
    how = dict(rows=rows, itemsize=itemsize)
    cut = tiles_linear.linear_tile(width=4096, columns=columns, parts=1, device=device, **how)
    assert cut.splits == ranges
    if ranges == 2:  # a multiprocessor keeps 1 KiB for itself of what each of its programs has
        assert 2 * (tiles_linear.shared_memory_bytes(cut, **how) + 1024) <= 228 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(block_columns=8), "block_columns=8 is not a power of two of at least 16"),
        (dict(tile_rows=24), "tile_rows=24 is not a power of two of at least 16"),
        (
            dict(shrink=dataclasses.replace(SHRINK, warps=3)),
            "warps=3 is not 1, 2, 4, 8 or 16",
        ),
        (dict(shrink=dataclasses.replace(SHRINK, stages=0)), "stages=0 is not at least 1"),
        (dict(shrink=dataclasses.replace(SHRINK, splits=0)), "shrink_splits=0 is not at least 1"),
        (dict(splits=0), "splits=0 is not at least 1"),
        (
            dict(block_k=4096),
            "it needs about 524288 bytes of shared memory, a program has 232448",
        ),
    ],
)
def test_illegal_cuts_say_why(change, message):
    cut = dataclasses.replace(CUT, **change)
    assert tiles_linear.refusals(cut, rows=1, itemsize=2) == [message]
