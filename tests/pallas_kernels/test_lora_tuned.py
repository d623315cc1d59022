"""Which tile a call of the LoRA operator gets, and which tiles are worth being measured."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import lora_matmul as op
from pallas_kernels.lora_matmul import candidates, tiles, triton, tuned, xla
from pallas_kernels.lora_matmul.candidates import Task, ladders, legal, registers
from pallas_kernels.lora_matmul.tune import key_of
from pallas_kernels.tuning import table as tuning_table
from pallas_kernels.tuning.run import tasks
from pallas_kernels.tuning.search import neighbours, paths
from pallas_kernels.tuning.table import Entry, Key, Table, TableError, path_of
from valora_jax.lora.batch import LoraBatch

DEVICE = "NVIDIA H100 80GB HBM3"
TASKS = tasks([])


def key(tokens: int, *, columns=4096, segments="any") -> Key:
    return Key(op="lora", width=4096, columns=columns, tokens=tokens, segments=segments)


def entry(of: Key, *, height: int, us=10.0, **changes) -> Entry:
    tile = tuned.computed_tile(of, block_rows=height, device=DEVICE)
    return Entry(key=of, tile=dataclasses.replace(tile, **changes), us=us)


@pytest.fixture
def device(monkeypatch, tmp_path):
    """This machine's device, of which tables are read from an empty folder."""
    monkeypatch.setattr(tuning_table, "FOLDER", tmp_path)
    tuned.table.cache_clear()
    yield jax.devices()[0].device_kind
    tuned.table.cache_clear()


def ship(device: str, *entries: Entry) -> None:
    table = Table(device=device, jax="0.11.2", kinds=tuned.KINDS)
    for one in entries:
        table.add(one)
    table.write(path_of(device))


def tile_of_call(monkeypatch, *, rows: int, dtype=jnp.bfloat16, block_rows=16, **choice):
    """The tile with which `lora_matmul` calls the kernels, for 4096 -> 4096."""
    given = []

    def kernel(*args, tile, **keywords):
        given.append(tile)
        return 0

    monkeypatch.setattr(triton, "lora_update", kernel)
    pool = op.LoraPool(
        a_RD=jnp.zeros((16, 4096), dtype),
        b_RE=jnp.zeros((16, 4096), dtype),
        scale_LS=jnp.ones((1, 1)),
        page_SW=jnp.zeros((1, 1), jnp.int32),
        pages_S=jnp.ones(1, jnp.int32),
    )
    rows_T = jnp.zeros(rows, jnp.int32)
    op.lora_matmul(
        jnp.zeros((rows, 4096), dtype),
        jnp.zeros((rows, 4096), dtype),
        [op.Part(pool=pool, column=0)],
        tiles=op.RowTiles.of(rows_T, block_rows=block_rows),
        layer=0,
        implementation="triton",
        **choice,
    )
    return given[0]


def test_a_call_takes_the_tile_of_its_rows_and_class(device, monkeypatch):
    few, many = entry(key(32, segments="few"), height=16), entry(key(32), height=16, row_programs=4)
    ship(device, few, many)
    assert tile_of_call(monkeypatch, rows=32, segments="few") == few.tile
    assert tile_of_call(monkeypatch, rows=32) == many.tile
    own = dataclasses.replace(few.tile, row_programs=7)
    assert tile_of_call(monkeypatch, rows=32, tile=own) == own


def test_programs_along_the_rows_follow_the_rows(device, monkeypatch):
    ship(device, entry(key(32), height=16, row_programs=8))
    assert tile_of_call(monkeypatch, rows=48).row_programs == 12
    assert tile_of_call(monkeypatch, rows=1).row_programs == 1


@pytest.mark.parametrize("call", [dict(dtype=jnp.float32), dict(block_rows=32)])
def test_what_was_not_measured_gets_a_computed_tile(device, monkeypatch, call):
    ship(device, entry(key(8), height=16, row_programs=3))
    height = call.get("block_rows", 16)
    want = tuned.computed_tile(key(8), block_rows=height, device=device)
    tile = tile_of_call(monkeypatch, rows=8, **call)
    assert tile == want
    assert tile.row_programs != 3


def test_without_a_table_tiles_are_computed(device, monkeypatch):
    want = tiles.lora_tile(rows=8, width=4096, columns=4096)
    assert tile_of_call(monkeypatch, rows=8) == want
    assert op.block_rows(500, implementation="triton") == tiles.block_rows(500)


def test_row_tiles_have_the_height_that_was_the_fastest(device):
    ship(device, entry(key(512), height=32, us=9), entry(key(512), height=64, us=8))
    assert op.block_rows(600, implementation="triton") == 64
    assert op.block_rows(600, implementation="xla") == xla.BLOCK_ROWS
    batch = LoraBatch.of(
        jnp.zeros(600, jnp.int32), pools={}, biases_LSE={}, implementation="triton"
    )
    assert batch.tiles.block_rows == 64


def test_a_batch_keeps_its_class_for_fewer_rows(device):
    ship(
        device,
        entry(key(8, segments="few"), height=16),
        entry(key(128), height=32),
        entry(key(128, segments="few"), height=64),
    )
    rows_T = jnp.zeros(128, jnp.int32)
    batch = LoraBatch.of(rows_T, pools={}, biases_LSE={}, implementation="triton", segments="few")
    assert (batch.tiles.block_rows, batch.at_rows(rows_T[:100]).tiles.block_rows) == (64, 64)


def test_a_damaged_table_is_an_error_not_a_computed_tile(device):
    path_of(device).write_text("[]")
    with pytest.raises(TableError, match="want the fields"):
        op.block_rows(8, implementation="triton")


def test_an_illegal_tile_is_an_error(device):
    ship(device, entry(key(8), height=16))
    text = path_of(device).read_text()
    path_of(device).write_text(re.sub(r'"block_columns": \d+', '"block_columns": 96', text))
    with pytest.raises(TableError, match="block_columns=96 is not a power of two"):
        op.tuned_table(device)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("block_rows", [16, 32, 64, 128])
def test_computed_tiles_are_legal_at_every_height(block_rows, itemsize):
    for rows in (1, 8, 64, 65, 128, 256, 1000, 32768):
        for width, columns in ((8, 8), (40, 24), (4096, 12288), (13824, 5120)):
            shape = Key(op="lora", width=width, columns=columns, tokens=rows, segments="any")
            tile = tuned.computed_tile(
                shape, block_rows=block_rows, itemsize=itemsize, device=DEVICE
            )
            assert tiles.refusals(tile, itemsize=itemsize) == []
            assert tile.block_rows == block_rows


@pytest.mark.parametrize("task", TASKS[::7], ids=lambda task: task.name)
def test_a_search_begins_with_a_tile_that_it_would_accept_and_has_somewhere_to_go(task):
    start = tuned.computed_tile(key_of(task), block_rows=task.block_rows, device=DEVICE)
    assert legal(start, task)
    found = neighbours(start, ladders(task), lambda tile: legal(tile, task))
    assert sum(map(len, found.values())) >= 8


def test_every_number_of_a_tile_is_searched_but_for_the_height():
    tile = tuned.computed_tile(key(8), block_rows=16, device=DEVICE)
    assert {path for path, _ in paths(tile)} - {"block_rows"} == ladders(TASKS[0]).keys()


def any_tile(task: Task):
    """Tiles of any rungs."""

    def tile_of(numbers):
        def cut(kind, name):
            fields = {p.removeprefix(name): n for p, n in numbers.items() if p.startswith(name)}
            return kind(**fields)

        return tiles.LoraTile(
            block_rows=task.block_rows,
            row_programs=numbers["row_programs"],
            shrink=cut(tiles.ShrinkTile, "shrink."),
            expand=cut(tiles.ExpandTile, "expand."),
        )

    rungs = {path: st.sampled_from(list(rung)) for path, rung in ladders(task).items()}
    return st.fixed_dictionaries(rungs).map(tile_of)


@given(st.sampled_from(TASKS).flatmap(lambda task: st.tuples(st.just(task), any_tile(task))))
def test_what_is_compiled_fits_the_device_and_the_shape(case):
    task, tile = case
    if not legal(tile, task):
        return
    assert tiles.refusals(tile, itemsize=2) == []
    assert max(registers(tile).values()) <= candidates.REGISTERS
    assert tile.shrink.block_k < 2 * task.linear.width
    assert tile.expand.block_columns < 2 * max(task.linear.columns)
    assert tile.row_programs < 2 * (task.row_tiles + candidates.MOST_SEGMENTS)


def test_registers_are_counted_by_thread():
    tile = tuned.computed_tile(key(4096), block_rows=128, device=DEVICE)
    wide = dataclasses.replace(
        tile, expand=dataclasses.replace(tile.expand, block_columns=256, warps=4)
    )
    # 128 x 256 sums, and as many to be stored, by 128 threads.
    assert registers(wide)["expand"] == 2 * 256 + candidates.SPARE_REGISTERS
    assert not legal(wide, dataclasses.replace(TASKS[0], tokens=4096, block_rows=128))
