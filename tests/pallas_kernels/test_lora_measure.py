"""What the tuner does with a tile on a device, here with interpreted kernels of a tiny model."""

import dataclasses

import jax
import pytest

from pallas_kernels.lora_matmul import api, measure
from pallas_kernels.lora_matmul.candidates import Task
from pallas_kernels.lora_matmul.measure import DeviceLostError, Measurements
from pallas_kernels.lora_matmul.tiles import ExpandTile, LoraTile, ShrinkTile
from pallas_kernels.tuning.shapes import LinearShape
from tests.pallas_kernels.hopper import interpret_kernels

LINEAR = LinearShape(width=40, columns=(24, 16))
TILE = LoraTile(
    block_rows=16,
    row_programs=2,
    shrink=ShrinkTile(block_k=16, block_ranks=32, rank_programs=1, splits=2, warps=4, stages=2),
    expand=ExpandTile(block_columns=16, blocks=1, block_ranks=32, warps=4, stages=2),
)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    interpret_kernels(monkeypatch)
    for name, value in dict(LAYERS=4, PRODUCTS=2, SAMPLES=1, SAMPLE_S=1e-9, SLOTS=8).items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(measure, "ADAPTERS", {"few": 1, "some": 4, "many": 8})


def measured(tokens: int, *tiles: LoraTile):
    task = Task(linear=LINEAR, tokens=tokens, block_rows=16)
    return Measurements(LINEAR).of(task, tiles)


def test_every_class_that_the_rows_can_have_is_timed():
    outcomes = measured(5, TILE)
    assert outcomes[TILE].keys() == {"few", "some"}
    assert all(us > 0 for us in outcomes[TILE].values())


def test_a_wrong_result_is_no_time(monkeypatch):
    def off_by_one(y_TE, x_TD, parts, *, layer, implementation, **keywords):
        layer = (layer + 1) % measure.LAYERS if implementation == "triton" else layer
        return api.lora_matmul(
            y_TE, x_TD, parts, layer=layer, implementation=implementation, **keywords
        )

    monkeypatch.setattr(measure, "lora_matmul", off_by_one)
    assert measured(2, TILE)[TILE].startswith("wrong by ")
    assert measured(2, TILE)[TILE].endswith(" times the tolerance with few adapters")


def test_a_tile_that_does_not_compile_is_no_time_for_itself_alone():
    illegal = dataclasses.replace(TILE, shrink=dataclasses.replace(TILE.shrink, block_k=48))
    outcomes = measured(1, illegal, TILE)
    assert "block_k=48 is not a power of two" in outcomes[illegal]
    assert outcomes[TILE].keys() == {"few"}


def failing(*args):
    raise jax.errors.JaxRuntimeError("INTERNAL: illegal address\nand more")


def test_a_failing_tile_is_no_time_and_the_device_goes_on(monkeypatch):
    monkeypatch.setattr(measure, "_us_of_call", failing)
    assert measured(1, TILE) == {TILE: "INTERNAL: illegal address"}


def test_a_tile_that_takes_the_device_with_it_ends_the_search(monkeypatch):
    monkeypatch.setattr(measure, "_us_of_call", failing)
    monkeypatch.setattr(jax, "block_until_ready", failing)
    with pytest.raises(DeviceLostError, match="illegal address; start again") as lost:
        measured(1, TILE)
    assert lost.value.tile == TILE
