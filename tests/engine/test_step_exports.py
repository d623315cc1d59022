"""The engine's step at the widths of a 7B model, lowered for devices that are not here."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax import export

from benchmarks import decode_inputs
from benchmarks.decode_inputs import DTYPE, Batch
from tests.pallas_kernels.hopper import launches, lower_for_hopper
from valora_jax.engine import step
from valora_jax.models.build import abstract_model
from valora_jax.models.llava15.config import LLAVA_1_5_7B
from valora_jax.models.llava15.spec import spec_of

LAYERS = 2
SPEC = spec_of(
    dataclasses.replace(
        LLAVA_1_5_7B, decoder=dataclasses.replace(LLAVA_1_5_7B.decoder, layers=LAYERS)
    )
)
BATCHES = {
    "decodes": Batch(requests=8, tokens=1, kv_tokens=800, adapters=8),
    "prompts": Batch(requests=2, tokens=256, kv_tokens=256, adapters=2),
}


def step_of(batch: Batch, *, kernel: str):
    """The function of a step, and the shapes of its arguments; nothing is allocated."""
    graphdef, state = nnx.split(abstract_model(SPEC, dtype=DTYPE), nnx.Param)
    leaves, treedef = jax.tree.flatten(state)
    shape = step.StepShape(
        model=step.ModelShape(graphdef=graphdef, treedef=treedef, layers=LAYERS),
        layout=decode_inputs.layout(SPEC, batch),
        with_lora=True,
        dtype=np.dtype(DTYPE),
        kernel=kernel,
    )
    carry, adapters = jax.eval_shape(
        lambda: (decode_inputs.carry(SPEC, batch), decode_inputs.adapter_arrays(SPEC))
    )
    packed = jax.ShapeDtypeStruct((shape.layout.size,), np.int32)
    leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    return functools.partial(step.decoder_step, shape), (leaves, *carry, adapters, packed)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_the_xla_step_lowers_for_a_tpu(batch):
    run, arguments = step_of(batch, kernel="xla")
    exported = export.export(jax.jit(run), platforms=["tpu"])(*arguments)
    assert exported.platforms == ("tpu",)
    assert "stablehlo.dot_general" in exported.mlir_module()


# Attention of a layer: rotary, write and attention in one launch, or write, decodes and chunks.
# Four products with adapters: one launch, in the text one for all layers, or shrink and expand.
KERNELS = {"decodes": LAYERS * 1 + 4, "prompts": LAYERS * 3 + 4 * 2}


@pytest.mark.parametrize("name", KERNELS)
def test_the_triton_step_lowers_for_a_gpu(name):
    run, arguments = step_of(BATCHES[name], kernel="triton")
    assert launches(lower_for_hopper(run, *arguments)) >= KERNELS[name]
