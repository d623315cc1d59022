"""What the tuner does with a tile on a device, here with interpreted kernels of a tiny model."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pallas_kernels.lora_matmul import measure
from pallas_kernels.lora_matmul.candidates import Task
from pallas_kernels.lora_matmul.measure import DeviceLostError, Measurements
from pallas_kernels.lora_matmul.tiles import ExpandTile, LoraTile, ShrinkTile
from pallas_kernels.lora_matmul.tiles_linear import LinearTile
from pallas_kernels.lora_matmul.tuned import LINEAR, LORA
from pallas_kernels.tuning.compilers import Compilers
from pallas_kernels.tuning.shapes import LinearShape
from tests.pallas_kernels.hopper import interpret_kernels

SHAPE = LinearShape(width=40, columns=(24, 16))
SHRINK = ShrinkTile(block_k=16, block_ranks=32, rank_programs=1, splits=2, warps=4, stages=2)
TILE = LoraTile(
    block_rows=16,
    row_programs=2,
    shrink=SHRINK,
    expand=ExpandTile(block_columns=16, blocks=1, block_ranks=32, warps=4, stages=2),
)
LINEAR_TILE = LinearTile(
    block_columns=16,
    block_k=16,
    block_ranks=32,
    tile_rows=16,
    row_programs=2,
    splits=1,
    shrink=SHRINK,
)


@pytest.fixture(autouse=True, scope="module")
def _no_cache():
    """As in compilers: what is read from a cache cannot be passed on."""
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or jax keeps what it decided at first
    yield
    jax.config.update("jax_enable_compilation_cache", cached)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    interpret_kernels(monkeypatch)
    tiny = dict(MOST_RESULTS=1, LEAST_CALLS=2, SAMPLES=1, SAMPLE_S=1e-9, SLOTS=8)
    for name, value in dict(LAYERS=4, WEIGHTS=2, **tiny).items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(measure, "ADAPTERS", {"few": 1, "some": 4, "many": 8})


def measured(tokens: int, *tiles):
    op = LORA if isinstance(tiles[0], LoraTile) else LINEAR
    task = Task(op=op, linear=SHAPE, tokens=tokens, block_rows=16)
    with Compilers(ThreadPoolExecutor(1)) as compilers:  # interpreters are of this process
        measurements = Measurements(task, compilers)
        measurements.start(tiles)
        return measurements.finish()


ILLEGAL = {
    LORA: dataclasses.replace(TILE, shrink=dataclasses.replace(SHRINK, block_k=48)),
    LINEAR: dataclasses.replace(LINEAR_TILE, block_k=48),
}


@pytest.mark.parametrize(("op", "tile"), [(LORA, TILE), (LINEAR, LINEAR_TILE)])
def test_every_class_that_the_rows_can_have_is_timed(op, tile):
    outcomes = measured(5, ILLEGAL[op], tile)
    assert outcomes[tile].keys() == {"few", "some"}
    assert all(us > 0 for us in outcomes[tile].values())
    assert "block_k=48 is not a power of two" in outcomes[ILLEGAL[op]]


def test_a_wrong_result_is_no_time(monkeypatch):
    monkeypatch.setattr(measure, "_dense", lambda *_: jnp.ones((measure.CHECKED_ROWS, 40)))
    outcome = measured(1, LINEAR_TILE)[LINEAR_TILE]
    assert outcome.startswith("wrong by ")
    assert outcome.endswith(" times the tolerance with few adapters")


def failing(*args, **keywords):
    raise jax.errors.JaxRuntimeError("INTERNAL: illegal address\nand more")


@pytest.fixture
def _failing_tile(monkeypatch):
    monkeypatch.setattr(Compilers, "submit", lambda *_: lambda: b"")
    monkeypatch.setattr(measure, "load", failing)


@pytest.mark.usefixtures("_failing_tile")
def test_a_failing_tile_is_no_time_and_the_device_goes_on():
    assert measured(1, TILE) == {TILE: "INTERNAL: illegal address"}


@pytest.mark.usefixtures("_failing_tile")
def test_a_tile_that_takes_the_device_with_it_ends_the_search(monkeypatch):
    monkeypatch.setattr(jax, "block_until_ready", failing)
    with pytest.raises(DeviceLostError, match="illegal address; start again") as lost:
        measured(1, TILE)
    assert lost.value.tile == TILE
