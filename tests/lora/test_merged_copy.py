"""The copy against the same sum in NumPy, and against itself after many changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lora_matmul import PAGE_RANKS, LoraPool
from valora_jax.lora import merged_copy
from valora_jax.lora.merged_copy import MergedCopy, MergedLinear, copy_bytes

# As wide as a GPU's kernel asks for.
LAYERS, SLOTS, WIDTH = 2, 3, 64
COLUMNS = {"decoder.q": 64, "decoder.k": 128, "decoder.o": 64}
# Two linears a layer, the first of them two in one; the embedding at 0 is shared.
LINEARS = [
    MergedLinear(leaf=2 + 2 * layer, sites=("decoder.o",), columns=(0,), layer=layer)
    for layer in range(LAYERS)
] + [
    MergedLinear(leaf=1 + 2 * layer, sites=("decoder.q", "decoder.k"), columns=(0, 64), layer=layer)
    for layer in range(LAYERS)
]


def random(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def base_leaves(dtype) -> list[jax.Array]:
    widths = [24, *(192, 64) * LAYERS]
    return [random(i, WIDTH, width, dtype=dtype) for i, width in enumerate(widths)]


def pools(*, without: str = "", dtype=jnp.float32) -> dict[str, LoraPool]:
    """An adapter of one page in slot 0, one of two pages in slot 1, none in slot 2."""
    found = {}
    for i, (site, width) in enumerate(COLUMNS.items()):
        if site == without:
            continue
        rows = LAYERS * 4 * PAGE_RANKS
        found[site] = LoraPool(
            a_RD=without_page_0(random(100 + i, rows, WIDTH, dtype=dtype)),
            b_RE=without_page_0(random(200 + i, rows, width, dtype=dtype)),
            scale_LS=random(300 + i, LAYERS, SLOTS),
            page_SW=jnp.array([[2, 0], [3, 1], [0, 0]]),
            pages_S=jnp.array([1, 2, 0]),
        )
    return found


def without_page_0(rows: jax.Array) -> jax.Array:
    return rows.reshape(LAYERS, 4, PAGE_RANKS, -1).at[:, 0].set(0).reshape(rows.shape)


def update(pool: LoraPool, *, layer: int, slot: int) -> np.ndarray:
    a_LPrD, b_LPrE = (
        np.reshape(np.float32(x), (LAYERS, 4, PAGE_RANKS, -1)) for x in (pool.a_RD, pool.b_RE)
    )
    pages = np.array(pool.page_SW)[slot, : int(pool.pages_S[slot])]
    pairs = [(a_LPrD[layer, p], b_LPrE[layer, p]) for p in pages]
    return float(pool.scale_LS[layer, slot]) * sum((a.T @ b for a, b in pairs), np.float32(0))


def fill(copy: MergedCopy, own: dict[str, LoraPool], slot: int) -> None:
    for nth in range(copy.layers):
        copy.fill(nth, own, slot=slot)


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return np.dtype(request.param)


def make(base) -> MergedCopy:
    return MergedCopy(base, LINEARS, implementation="triton")  # which stands for what is fastest


def test_each_layer_has_the_update_of_its_own_adapter(dtype):
    base, own = {dtype: base_leaves(dtype)}, pools(without="decoder.k", dtype=dtype)
    copy = make(base)
    fill(copy, own, 1)
    for linear in LINEARS:
        want_DE = np.array(base[dtype][linear.leaf], np.float32)
        for site, column in zip(linear.sites, linear.columns, strict=True):
            if site in own:
                own_DE = update(own[site], layer=linear.layer, slot=1)
                want_DE[:, column : column + own_DE.shape[1]] += own_DE
        got_DE = copy.leaves(dtype)[linear.leaf]
        assert got_DE.dtype == dtype
        tolerance = 1e-5 if dtype == np.float32 else 2**-8  # one rounding
        np.testing.assert_allclose(np.array(got_DE, np.float32), want_DE, rtol=tolerance, atol=1e-5)
    assert copy.leaves(dtype)[0] is base[dtype][0]


def test_an_empty_slot_makes_a_copy_of_the_base(dtype):
    base = {dtype: base_leaves(dtype)}
    copy = make(base)
    fill(copy, pools(), 0)
    fill(copy, pools(), 2)
    for got, want in zip(copy.leaves(dtype), base[dtype], strict=True):
        np.testing.assert_array_equal(np.array(got), np.array(want))


def test_ten_thousand_changes_leave_no_trace():
    """The copy is the fresh one bit for bit, however often and in whatever order it was filled."""
    bf16 = np.dtype(jnp.bfloat16)
    base, own = {bf16: base_leaves(bf16)}, pools(dtype=bf16)
    fresh = []
    for slot in range(SLOTS):
        copy = make(base)
        fill(copy, own, slot)
        fresh.append([np.array(leaf).tobytes() for leaf in copy.leaves(bf16)])
    copy, rng = make(base), np.random.default_rng(0)
    order = rng.integers(0, [copy.layers, SLOTS], (10_000, 2)).tolist()
    for nth, slot in order:
        copy.fill(nth, own, slot=slot)  # most are left half filled
    for slot in (order[0][1], 0, 1, 2):
        fill(copy, own, slot)
        assert [np.array(leaf).tobytes() for leaf in copy.leaves(bf16)] == fresh[slot]


def test_its_memory_is_that_of_the_linears():
    f32 = np.dtype(np.float32)
    base = {f32: base_leaves(f32)}
    assert copy_bytes(base, LINEARS) == 4 * LAYERS * WIDTH * (192 + 64)


def test_the_quickest_of_a_few_merges_counts(monkeypatch):
    f32 = np.dtype(np.float32)
    copy, clock = make({f32: base_leaves(f32)}), iter([0.0, 0.05, 1.0, 1.01, 2.0, 2.02])
    monkeypatch.setattr(merged_copy.time, "perf_counter", lambda: next(clock))
    assert copy.measure_ms(pools()) == pytest.approx(10.0)


def test_measuring_leaves_a_copy_that_can_be_filled():
    f32 = np.dtype(np.float32)
    copy = make({f32: base_leaves(f32)})
    assert copy.measure_ms(pools()) > 0
    fill(copy, pools(), 2)
    np.testing.assert_array_equal(copy.leaves(f32)[1], base_leaves(f32)[1])
