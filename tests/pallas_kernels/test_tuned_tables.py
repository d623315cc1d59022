"""The tables in the package: whole, and every tile in them lowers for a GPU."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import lora_matmul as op
from pallas_kernels.lora_matmul import tuned
from pallas_kernels.lora_matmul.candidates import Task
from pallas_kernels.lora_matmul.measure import RUNS
from pallas_kernels.lora_matmul.tiles import LoraTile
from pallas_kernels.lora_matmul.tune import SPACES
from pallas_kernels.tuning import table as tuning_table
from pallas_kernels.tuning.shapes import LinearShape
from pallas_kernels.tuning.table import Table, path_of
from tests.pallas_kernels.hopper import launches, lower_for_hopper

PARTS = 4  # of the test, for those who run tests side by side
SHAPE = LinearShape(width=4096, columns=(4096,))


def tables() -> list[Table]:
    found = []
    for path in sorted(tuning_table.FOLDER.glob("*.json")):
        device = json.loads(path.read_text())["device"]
        assert path_of(device) == path
        found.append(Table.read(path, device=device, kinds=tuned.KINDS))
    return found


def tiles_of_part(part: int) -> list:
    """Tiles of all tables, and computed ones, for the test to have some.

    Each once but for `row_programs`, which is how often the same code is launched.
    """
    tasks = (Task(op=op, linear=SHAPE, tokens=8, block_rows=16) for op in SPACES)
    computed = itertools.chain(*(SPACES[task.op].starts(task, "") for task in tasks))
    shipped = (entry.tile for table in tables() for _, entry in sorted(table.entries.items()))
    alike = (dataclasses.replace(tile, row_programs=1) for tile in (*computed, *shipped))
    return list(dict.fromkeys(alike))[part::PARTS]


def call_of(tile):
    """A function that launches a tile's kernels for one linear, and the shapes of its arrays."""
    is_pair, (width, (columns,)), T = isinstance(tile, LoraTile), SHAPE, 32
    pool = op.LoraPool(
        a_RD=shape(1024, width),
        b_RE=shape(1024, columns),
        scale_LS=shape(1, 32, dtype=jnp.float32),
        page_SW=shape(32, 8, dtype=jnp.int32),
        pages_S=shape(32, dtype=jnp.int32),
    )
    weights = () if is_pair else (shape(width, columns),)
    height = tile.block_rows if is_pair else tile.tile_rows
    row_tiles = jax.eval_shape(
        lambda slot_T: op.RowTiles.of(slot_T, block_rows=height), shape(T, dtype=jnp.int32)
    )
    run = RUNS[tuned.LORA if is_pair else tuned.LINEAR]
    call = functools.partial(run, tile=tile, columns=(0,), calls=1)
    return call, (shape(T, width), weights, (pool,), row_tiles)


def shape(*size: int, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(size, dtype)


@pytest.mark.parametrize("part", range(PARTS))
def test_tiles_lower(part):
    for tile in tiles_of_part(part):
        fn, shapes = call_of(tile)
        # Shrink and expand, or the lists of a step and the linear.
        assert launches(lower_for_hopper(fn, *shapes)) == 2
