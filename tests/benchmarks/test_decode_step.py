"""The decode benchmark's batches on a tiny model: the engine's own step takes them on a CPU."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decode_inputs, decode_step
from benchmarks.decode_inputs import Batch
from benchmarks.gpu import Options
from pallas_kernels.tuning.shapes import MODELS, ModelShape
from valora_jax.models.llava15.config import LLAVA_1_5_7B
from valora_jax.models.llava15.spec import spec_of

TINY = ModelShape(layers=2, width=64, heads=4, kv_heads=4, head_width=16, mlp_width=96)
CONFIG = dataclasses.replace(
    LLAVA_1_5_7B,
    vision=dataclasses.replace(
        LLAVA_1_5_7B.vision, width=32, layers=2, heads=2, mlp_width=48, image_size=56
    ),
    decoder=dataclasses.replace(
        LLAVA_1_5_7B.decoder,
        width=64,
        layers=2,
        heads=4,
        kv_heads=4,
        head_width=16,
        mlp_width=96,
        max_positions=1024,
    ),
)


@pytest.fixture
def bench(monkeypatch):
    """On "xla" in float32, which a CPU can run."""
    for module in (decode_step, decode_inputs):
        monkeypatch.setattr(module, "DTYPE", jnp.float32)
    monkeypatch.setattr(decode_step, "LLAVA_1_5_7B", CONFIG)
    bench = decode_step.Bench(spec_of(CONFIG), TINY)
    make = bench._make_step_shape
    bench._step_shape = functools.cache(lambda **keywords: make(**keywords | {"impl": "xla"}))
    return bench


def all_programs(bench, *arguments):
    options = Options.parse("A bench.", arguments)
    return [program for group in decode_step.groups(bench, options) for program in group]


def test_every_row_of_the_goals_is_there_once(bench):
    names = [program.name for program in all_programs(bench)]
    assert len(names) == len(set(names))
    assert {
        "decode/b8/none/triton",
        "decode/b8/unused/triton",
        "decode/b8/one/triton",
        "decode/b32/each/triton",
        "first-token/one/triton",
        "prefill/each/triton",
    } <= set(names)
    assert {p.name for p in all_programs(bench, "--quick")} < set(names)


@pytest.mark.parametrize("name", ["decode/b8/each/triton", "first-token/one/triton"])
def test_the_engines_step_takes_the_batch(bench, name):
    (program,) = (p for p in all_programs(bench) if p.name == name)
    returned = program.run(program.carry(), *program.inputs())
    assert program.error(returned) == 0
    assert float(abs(returned[1].hidden_TD).max()) > 0


def test_batches_of_one_shape_share_a_function_to_compile(bench):
    run_of = {p.name: p.run for p in all_programs(bench)}
    assert run_of["decode/b8/one/triton"] is run_of["decode/b8/each/triton"]
    assert run_of["decode/b8/none/triton"] is not run_of["decode/b8/one/triton"]


def test_neighbouring_requests_share_an_adapter():
    spec = spec_of(CONFIG)
    batch = Batch(requests=8, tokens=1, kv_tokens=100, adapters=2)
    fields = decode_inputs.layout(spec, batch).unpack(decode_inputs.packed(spec, batch))
    np.testing.assert_array_equal(fields["adapter"], [0, 0, 0, 0, 1, 1, 1, 1])
    pages = np.asarray(fields["decode_page"])[:, : batch.request_pages]
    assert sorted(pages.ravel()) == list(range(1, 17))
    np.testing.assert_array_equal(fields["page"], pages[:, -1])


def test_shapes_are_those_of_the_engines_model():
    decoder, shape = LLAVA_1_5_7B.decoder, MODELS[decode_step.MODEL]
    for field in ("layers", "width", "heads", "kv_heads", "head_width", "mlp_width"):
        assert getattr(decoder, field) == getattr(shape, field)
