"""The rank lists of a step of few rows: interpreted, against what they promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lora_matmul as op
from pallas_kernels.lora_matmul.layout import PAGE_RANKS
from pallas_kernels.lora_matmul.rank_tables import TILE_FIELDS, TileRow, rank_tables
from pallas_kernels.lora_matmul.triton_lists import LIST_FIELDS, rank_lists
from tests.pallas_kernels.hopper import interpret_kernels

ROWS, SLOTS, WIDEST = 8, 6, 5  # pages of the largest adapter
BLOCK_PAGES = 4


@pytest.fixture
def lay_out(monkeypatch):
    """Lays out rows of slots, given the pages of each slot in each part, and what is folded in."""
    interpret_kernels(monkeypatch)

    @jax.jit
    def lay_out(adapter_T, merged, pages_PSW, pages_PS):
        pools = [
            op.LoraPool(
                a_RD=jnp.zeros((PAGE_RANKS, 16)),
                b_RE=jnp.zeros((PAGE_RANKS, 16)),
                scale_LS=jnp.zeros((1, SLOTS)),
                page_SW=pages_SW,
                pages_S=pages_S,
            )
            for pages_SW, pages_S in zip(pages_PSW, pages_PS, strict=True)
        ]
        tiles = op.RowTiles.of(adapter_T, merged=merged, block_rows=16)
        sizes = dict(block_ranks=BLOCK_PAGES * PAGE_RANKS, shrink_ranks=16, rank_programs=2)
        lists = rank_lists(pools, tiles, **sizes)
        of_xla, _ = rank_tables(
            pools, tiles, block_ranks=sizes["block_ranks"], rank_programs=sizes["rank_programs"]
        )
        return lists.arrays, lists.tables, of_xla

    return lay_out


def pages_of_row(adapter, merged, part, page_PSW, pages_PS) -> list[int]:
    """What a row multiplies: pages of its own adapter, then of the one it subtracts."""
    slots = [] if adapter == merged else [slot for slot in (adapter, merged) if slot >= 0]
    return [int(page) for slot in slots for page in page_PSW[part, slot, : pages_PS[part, slot]]]


def pages_in_blocks(lists, part, row, parts) -> list[int]:
    """What the kernel multiplies a row's sums with, in the order of these."""
    list_MF, page_MQ = np.asarray(lists.list_MF), np.asarray(lists.page_MQ)
    if (own := np.asarray(lists.list_T)[row]) < 0:
        return []
    pages, place, *blocks = list_MF[part * ROWS + own]
    K = (len(lists.blocks_N) - 1) // parts
    assert all(block < 0 for block in blocks[:K][-(-(pages + place) // BLOCK_PAGES) :])
    found = []
    for n in range(place, place + pages):
        k, q = divmod(n, BLOCK_PAGES)
        assert 0 <= blocks[k] < lists.blocks_N[part * K + k]
        found.append(int(page_MQ[(part * K + k) * ROWS + blocks[k], q]))
    return found


def what_is_read(table_MX) -> np.ndarray:
    """Of a table: its numbers but for `place`, and page ids up to the end of each list."""
    numbers_MF, page_MQ = np.split(np.array(table_MX)[:ROWS], [TILE_FIELDS], axis=1)
    pages_M = numbers_MF[:, TileRow._fields.index("pages")]
    page_MQ[np.arange(page_MQ.shape[1]) >= pages_M[:, None]] = 0
    return np.hstack([np.delete(numbers_MF, TileRow._fields.index("place"), axis=1), page_MQ])


def test_each_row_meets_its_pages_once_and_short_lists_share_blocks(lay_out):
    rng = np.random.default_rng(0)
    for _ in range(40):
        slots = rng.integers(-1, SLOTS, 3)
        adapter_T = (
            np.sort(rng.choice(slots, ROWS)) if rng.random() < 0.7 else rng.choice(slots, ROWS)
        )
        merged = int(rng.choice([-1, slots[0]]))
        pages_PS = rng.integers(0, WIDEST + 1, (2, SLOTS))
        page_PSW = rng.permutation(200)[: 2 * SLOTS * WIDEST].reshape(2, SLOTS, WIDEST) + 1
        lists, tables, of_xla = lay_out(*map(jnp.int32, (adapter_T, merged, page_PSW, pages_PS)))
        for table_MX, of_xla_MX in zip(tables, of_xla, strict=True):
            np.testing.assert_array_equal(*map(what_is_read, (table_MX, of_xla_MX)))
        of_row = functools.partial(
            pages_of_row, merged=merged, page_PSW=page_PSW, pages_PS=pages_PS
        )
        for part in range(2):
            wanted = [of_row(adapter, part=part) for adapter in adapter_T]
            got = [pages_in_blocks(lists, part, row, 2) for row in range(ROWS)]
            assert got == wanted
            working = [n for n, a in enumerate(adapter_T) if a != merged]
            begins = [
                n
                for n, m in zip(working, [None, *working], strict=False)
                if m is None or adapter_T[n] != adapter_T[m]
            ]
            runs = [wanted[n] for n in begins]
            room = sum(min(1 << (len(p) - 1).bit_length(), BLOCK_PAGES) for p in runs if p)
            K = len(lists.blocks_N) // 2
            blocks = np.asarray(lists.blocks_N)[part * K : (part + 1) * K]
            assert blocks[0] == -(-room // BLOCK_PAGES)
            assert blocks[1:].tolist() == [
                sum(len(p) > k * BLOCK_PAGES for p in runs) for k in range(1, K)
            ]


def test_places_that_nobody_takes_have_page_0(lay_out):
    pages_PS = np.full((2, SLOTS), 3)
    page_PSW = 1 + np.arange(2 * SLOTS * WIDEST).reshape(2, SLOTS, WIDEST)
    lists, *_ = lay_out(*map(jnp.int32, ([0] * ROWS, -1, page_PSW, pages_PS)))
    assert np.asarray(lists.list_MF)[0, : LIST_FIELDS + 1].tolist() == [3, 0, 0]
    assert np.asarray(lists.page_MQ)[0].tolist() == [*page_PSW[0, 0, :3], 0]
