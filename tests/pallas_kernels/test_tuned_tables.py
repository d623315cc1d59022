"""The tables in the package: whole, and every tile in them lowers for a GPU."""

import dataclasses
import itertools
import json
import zlib

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import lora_matmul as op
from pallas_kernels.lora_matmul import tuned
from pallas_kernels.lora_matmul.tiles import LoraTile
from pallas_kernels.tuning import table as tuning_table
from pallas_kernels.tuning.table import Key, Table, path_of
from tests.pallas_kernels.hopper import launches, lower_for_hopper

PARTS = 4  # of the test, for those who run tests side by side


def tables() -> list[Table]:
    found = []
    for path in sorted(tuning_table.FOLDER.glob("*.json")):
        device = json.loads(path.read_text())["device"]
        assert path_of(device) == path
        found.append(Table.read(path, device=device, kinds=tuned.KINDS))
    return found


def tiles_to_lower() -> list[LoraTile]:
    """Tiles in which every kernel of the tables is: both launches' cuts, each once.

    And a computed one, for the test to have one.
    """
    computed = tuned.computed_tile(
        Key(op="lora", width=4096, columns=4096, tokens=8, segments="any"),
        block_rows=16,
        device="",
    )
    of_tables = [entry.tile for table in tables() for entry in table.entries.values()]
    by_height: dict[tuple[int, int], tuple[dict, dict]] = {}
    for tile in [computed, *of_tables]:
        # The expand adds up the sums of the splits, so it is another kernel for each number.
        shrinks, expands = by_height.setdefault((tile.block_rows, tile.shrink.splits), ({}, {}))
        shrinks[tile.shrink], expands[tile.expand] = tile, tile
    return [
        dataclasses.replace(shrink, expand=expand.expand)
        for shrinks, expands in by_height.values()
        for shrink, expand in _pairs(list(shrinks.values()), list(expands.values()))
    ]


def _pairs(a: list, b: list):
    """Every one of both, in as few pairs as that takes."""
    longest = max(len(a), len(b))
    return zip(*(itertools.islice(itertools.cycle(x), longest) for x in (a, b)), strict=True)


def shape(*size: int, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(size, dtype)


@pytest.mark.parametrize("part", range(PARTS))
def test_every_tile_lowers(part):
    pool = op.LoraPool(
        a_RD=shape(1024, 4096),
        b_RE=shape(1024, 4096),
        scale_LS=shape(1, 32, dtype=jnp.float32),
        page_SW=shape(32, 8, dtype=jnp.int32),
        pages_S=shape(32, dtype=jnp.int32),
    )
    for tile in tiles_to_lower():
        if zlib.crc32(str(tile).encode()) % PARTS != part:
            continue

        def add(y_TE, x_TD, pool, adapter_T, tile=tile):
            return op.lora_matmul(
                y_TE,
                x_TD,
                [op.Part(pool=pool, column=0)],
                tiles=op.RowTiles.of(adapter_T, block_rows=tile.block_rows),
                layer=0,
                implementation="triton",
                tile=tile,
            )

        T = tile.row_programs
        text = lower_for_hopper(
            add, shape(T, 4096), shape(T, 4096), pool, shape(T, dtype=jnp.int32)
        )
        assert launches(text) == 2
