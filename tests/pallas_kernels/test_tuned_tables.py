"""The tables in the package: whole, and what is launched at every key of them lowers for a GPU."""

import functools
import json
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import lora_matmul as op
from pallas_kernels.lora_matmul import tuned
from pallas_kernels.lora_matmul.candidates import Task
from pallas_kernels.lora_matmul.measure import RUNS
from pallas_kernels.lora_matmul.tiles import LoraTile
from pallas_kernels.lora_matmul.tiles_linear import LinearTile
from pallas_kernels.lora_matmul.tune import SPACES
from pallas_kernels.tuning import table as tuning_table
from pallas_kernels.tuning.shapes import MODELS, LinearShape
from pallas_kernels.tuning.table import Entry, Table, path_of
from tests.pallas_kernels.hopper import launches, lower_for_hopper
from tests.pallas_kernels.test_lora_lowering import columns_of

PARTS = 4  # of a test, for those who run tests side by side
# Every product of a model that is served, by what a table knows of it: its width and columns.
LINEARS = {
    (linear.width, sum(linear.columns)): linear
    for model in MODELS.values()
    for linear in model.linears.values()
}


class Call(NamedTuple):
    """A tile at work: for a product of linears, in a step of so many rows."""

    linear: LinearShape
    tokens: int
    tile: LoraTile | LinearTile


def tables() -> list[Table]:
    """All that are shipped."""
    found = []
    for path in sorted(tuning_table.FOLDER.glob("*.json")):
        device = json.loads(path.read_text())["device"]
        assert path_of(device) == path
        found.append(Table.read(path, device=device, kinds=tuned.KINDS))
    return found


def calls() -> list[Call]:
    """What the look-up finds at every key of all tables, and computed tiles, for the tests to have
    some; each once."""
    measured = (call_at(e, table.device) for table in tables() for e in table.entries.values())
    return list(dict.fromkeys((*computed_calls(), *measured)))


def call_at(entry: Entry, device: str) -> Call:
    """What a call of an entry's own shape launches, when its row tiles are as high as the entry's
    are."""
    key, linear = entry.key, LINEARS[entry.key.width, entry.key.columns]
    how = dict(itemsize=tuned.ITEM_BYTES, device=device)
    if key.op == tuned.LORA:
        tile = tuned.lora_tile_for(key, block_rows=entry.tile.block_rows, **how)
    else:
        parts = len(linear.columns)
        tile = tuned.linear_tile_for(key, parts=parts, tile_rows=entry.tile.tile_rows, **how)
    return Call(linear, key.tokens, tile)


def computed_calls() -> Iterator[Call]:
    """Tiles that a search begins with."""
    linear = LinearShape(width=4096, columns=(4096,))
    for name, space in SPACES.items():
        task = Task(op=name, linear=linear, tokens=8, block_rows=16)
        yield from (Call(linear, task.tokens, tile) for tile in space.starts(task, ""))


def program_of(call: Call):
    """A function that launches a call's kernels, and the shapes of its arrays."""
    (width, columns), T, tile = call
    is_pair = isinstance(tile, LoraTile)
    pools = tuple(
        op.LoraPool(
            a_RD=shape(1024, width),
            b_RE=shape(1024, of_part),
            scale_LS=shape(1, 32, dtype=jnp.float32),
            page_SW=shape(32, 8, dtype=jnp.int32),
            pages_S=shape(32, dtype=jnp.int32),
        )
        for of_part in columns
    )
    weights = () if is_pair else (shape(width, sum(columns)),)
    height = tile.block_rows if is_pair else tile.tile_rows
    row_tiles = jax.eval_shape(
        lambda slot_T: op.RowTiles.of(slot_T, block_rows=height), shape(T, dtype=jnp.int32)
    )
    run = RUNS[tuned.LORA if is_pair else tuned.LINEAR]
    program = functools.partial(run, tile=tile, columns=columns_of(columns), calls=1)
    return program, (shape(T, width), weights, pools, row_tiles)


def shape(*size: int, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(size, dtype)


@pytest.mark.parametrize("part", range(PARTS))
def test_tiles_lower(part):
    for call in calls()[part::PARTS]:
        fn, shapes = program_of(call)
        # Shrink and expand, or the lists of a step and the linear.
        assert launches(lower_for_hopper(fn, *shapes)) == 2
