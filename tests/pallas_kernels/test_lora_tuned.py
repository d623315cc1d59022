"""Which tile a call of the LoRA operator gets, and which tiles are worth being measured."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import lora_matmul as op
from pallas_kernels.lora_matmul import (
    candidates,
    candidates_linear,
    tiles,
    tiles_linear,
    triton,
    triton_linear,
    tuned,
    xla,
)
from pallas_kernels.lora_matmul.candidates import Task, legal, registers
from pallas_kernels.lora_matmul.tune import SPACES, search
from pallas_kernels.tuning import table as tuning_table
from pallas_kernels.tuning.run import tasks
from pallas_kernels.tuning.search import neighbours, paths, replaced
from pallas_kernels.tuning.table import Entry, Key, Table, TableError, path_of
from valora_jax.lora.batch import LoraBatch

DEVICE = "NVIDIA H100 80GB HBM3"
TASKS = tasks([])
TALL = next(task for task in TASKS if task.tokens == 4096)


def key(tokens: int, *, op="lora", columns=4096, segments="any") -> Key:
    return Key(op=op, width=4096, columns=columns, tokens=tokens, segments=segments)


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


def linear_entry(of: Key, *, us=10.0, **changes) -> Entry:
    tile = tiles_linear.linear_tile(
        rows=of.tokens, width=of.width, columns=of.columns, parts=1, itemsize=2
    )
    return Entry(key=of, tile=dataclasses.replace(tile, **changes), us=us)


def ship(device: str, *entries: Entry) -> None:
    table = Table(device=device, jax="0.11.2", kinds=tuned.KINDS)
    for one in entries:
        table.add(one)
    table.write(path_of(device))


def parts(dtype) -> list[op.Part]:
    pool = op.LoraPool(
        a_RD=jnp.zeros((16, 4096), dtype),
        b_RE=jnp.zeros((16, 4096), dtype),
        scale_LS=jnp.ones((1, 1)),
        page_SW=jnp.zeros((1, 1), jnp.int32),
        pages_S=jnp.ones(1, jnp.int32),
    )
    return [op.Part(pool=pool, column=0)]


def tile_of_call(monkeypatch, *, rows: int, dtype=jnp.bfloat16, block_rows=16, **choice):
    """The tile with which `lora_matmul` calls the kernels, for 4096 -> 4096."""
    given = []

    def kernel(*args, tile, **keywords):
        given.append(tile)
        return 0

    monkeypatch.setattr(triton, "lora_update", kernel)
    op.lora_matmul(
        jnp.zeros((rows, 4096), dtype),
        jnp.zeros((rows, 4096), dtype),
        parts(dtype),
        tiles=op.RowTiles.of(jnp.zeros(rows, jnp.int32), block_rows=block_rows),
        layer=0,
        implementation="triton",
        **choice,
    )
    return given[0]


def linear_tile_of_call(monkeypatch, *, rows: int, dtype=jnp.bfloat16):
    """The tile with which `lora_linear` calls its kernel, for 4096 -> 4096."""
    given = []

    def kernel(x_TD, w_DE, bias_E, pools, row_tiles, layer, *counters, cut, **keywords):
        given.append(cut)
        return x_TD, *counters

    monkeypatch.setattr(triton_linear, "lora_linear", kernel)
    op.lora_linear(
        jnp.zeros((rows, 4096), dtype),
        jnp.zeros((4096, 4096), dtype),
        parts(dtype),
        tiles=op.RowTiles.of(jnp.zeros(rows, jnp.int32), block_rows=16),
        layer=0,
        implementation="triton",
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


def test_all_blocks_of_128_ranks_have_programs_of_their_own(device, monkeypatch):
    cut = dict(block_ranks=32, rank_programs=2)
    shrink = dataclasses.replace(entry(key(512), height=16).tile.shrink, **cut)
    ship(device, entry(key(512), height=16, shrink=shrink))
    assert tile_of_call(monkeypatch, rows=512).shrink == replaced(shrink, "rank_programs", 4)


def for_mixtures(tile):
    """As a linear of one part takes it."""
    return replaced(tile, "shrink.rank_programs", 2)


def test_a_small_step_takes_the_tile_of_one_launch(device, monkeypatch):
    measured = linear_entry(key(8, op="linear"), row_programs=3, block_columns=64)
    ship(device, measured, entry(key(8), height=16))
    assert linear_tile_of_call(monkeypatch, rows=8) == for_mixtures(measured.tile)
    assert linear_tile_of_call(monkeypatch, rows=16).row_programs == 6
    computed = tiles_linear.linear_tile(rows=8, width=4096, columns=4096, parts=1, itemsize=4)
    assert linear_tile_of_call(monkeypatch, rows=8, dtype=jnp.float32) == computed
    assert linear_tile_of_call(monkeypatch, rows=8) == for_mixtures(measured.tile)


def test_ranks_are_shared_while_all_programs_find_a_multiprocessor(device, monkeypatch):
    shrink = dataclasses.replace(linear_entry(key(8, op="linear")).tile.shrink, splits=2)
    measured = linear_entry(key(16, op="linear"), row_programs=16, block_columns=64, shrink=shrink)
    ship(device, measured)  # 64 columns a program, and 16 * 2 shrink programs or twice as many
    assert linear_tile_of_call(monkeypatch, rows=16) == for_mixtures(measured.tile)
    assert linear_tile_of_call(monkeypatch, rows=18).shrink == shrink


def test_more_rows_keep_fewer_steps_in_flight_where_memory_ends(device, monkeypatch):
    measured = linear_entry(key(32, op="linear"), block_columns=64, block_k=256)
    ship(device, measured)
    tile = linear_tile_of_call(monkeypatch, rows=tiles_linear.MAX_ROWS)
    assert tile.stages < measured.tile.stages
    assert tiles_linear.refusals(tile, rows=tiles_linear.MAX_ROWS, itemsize=2) == []


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
    with pytest.raises(ValueError, match="unknown implementation 'cuda'; known: 'triton', 'xla'"):
        op.block_rows(600, implementation="cuda")
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
def test_a_search_begins_with_tiles_that_it_would_accept_and_has_somewhere_to_go(task):
    space = SPACES[task.op]
    for start in space.starts(task, DEVICE):
        assert space.legal(start, task)
        found = neighbours(start, space.ladders(task), lambda tile: space.legal(tile, task))
        assert sum(map(len, found.values())) >= 8


@pytest.mark.parametrize("tokens", [32, 64])
def test_a_search_of_few_columns_begins_with_one_range_and_with_two(tokens):
    task, *_ = tasks([], only=f"linear/4096-4096/t{tokens}/")
    table, first = Table(device=DEVICE, jax="0.11.2", kinds=tuned.KINDS), tokens // 32
    assert [tile.splits for tile in next(search(task, table))] == [first, 3 - first]
    table.add(known := linear_entry(key(tokens, op="linear"), block_columns=16))
    assert [tile == known.tile for tile in next(search(task, table))] == [True, False, False]


@pytest.mark.parametrize("op", SPACES)
def test_every_number_of_a_tile_is_searched_but_for_the_height(op):
    task = next(task for task in TASKS if task.op == op)
    names = {path for path, _ in paths(SPACES[op].starts(task, DEVICE)[0])}
    # The programs of an update's shrink follow from its blocks of ranks.
    given = {"block_rows", "tile_rows"} | ({"shrink.rank_programs"} if op == tuned.LORA else set())
    assert names - SPACES[op].ladders(task).keys() <= given
    assert SPACES[op].ladders(task).keys() < names


def any_tile(task: Task):
    """Tiles of any rungs."""

    def tile_of(numbers):
        tile, *_ = SPACES[task.op].starts(task, DEVICE)
        for path, number in numbers.items():
            tile = replaced(tile, path, number)
        return tile

    rungs = SPACES[task.op].ladders(task).items()
    choices = {path: st.sampled_from(list(numbers)) for path, numbers in rungs}
    return st.fixed_dictionaries(choices).map(tile_of)


@given(st.sampled_from(TASKS).flatmap(lambda task: st.tuples(st.just(task), any_tile(task))))
def test_what_is_compiled_fits_the_device_and_the_shape(case):
    task, tile = case
    if not SPACES[task.op].legal(tile, task):
        return
    assert tuned.KINDS[task.op].refusals(tile) == []
    assert tile.shrink.block_k < 2 * task.linear.width
    assert tile.row_programs < 2 * (task.row_tiles + candidates.MOST_SEGMENTS)
    if isinstance(tile, tiles.LoraTile):
        assert max(registers(tile).values()) <= candidates.REGISTERS
        assert tile.expand.block_columns < 2 * max(task.linear.columns)
    else:
        assert candidates_linear.registers(tile, rows=task.tokens) <= candidates.REGISTERS
        assert tile.block_columns < 2 * max(task.linear.columns)


def test_registers_are_counted_by_thread():
    tile = tuned.computed_tile(key(4096), block_rows=128, device=DEVICE)
    # 128 x 256 sums, and half as many words to be stored, by the threads. As ptxas has it: those of
    # four warps spill.
    for warps, fits in ((4, False), (8, True)):
        expand = dataclasses.replace(
            tile.expand, block_columns=256, blocks=1, stages=2, warps=warps
        )
        wide = dataclasses.replace(tile, expand=expand)
        assert registers(wide)["expand"] == 384 * 4 / warps + candidates.SPARE_REGISTERS
        assert legal(wide, dataclasses.replace(TALL, block_rows=128)) == fits
