"""Tests of the GPU kernels anywhere: interpreted where there is no GPU, or lowered for an H100."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import pytest
from jax import export
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

H100 = AbstractMesh(
    (1,),
    ("gpus",),
    axis_types=(AxisType.Auto,),
    abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"),
)


def lower_for_hopper(fn, *shapes, **keywords) -> str:
    """Lowers `fn` for an H100 down to StableHLO with its kernels in Triton IR.

    Args:
      fn: takes arrays in the places of `shapes` and `keywords`.
      shapes: pytrees of `jax.ShapeDtypeStruct`; `keywords` are alike.

    Returns:
      The StableHLO text, one custom call a kernel launch.
    """
    allowed = export.DisabledSafetyCheck.custom_call(plgpu.CUSTOM_CALL_TARGET_NAME)
    lower = export.export(jax.jit(fn), platforms=["cuda"], disabled_checks=[allowed])
    with jax.sharding.use_abstract_mesh(H100):
        return lower(*shapes, **keywords).mlir_module()


def launches(stablehlo: str) -> int:
    """How many kernel launches the text of `lower_for_hopper` holds."""
    return stablehlo.count(f"@{plgpu.CUSTOM_CALL_TARGET_NAME}")


def interpret_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has Pallas interpret the kernels that are traced until the end of the test; not on a GPU.

    What was traced before or is traced later is another matter: a test that asks for the same
    shapes interpreted and lowered clears jax's caches in between.
    """
    if jax.default_backend() != "gpu":
        # Interpreted programs run one after the other, each in one piece.
        monkeypatch.setattr(plgpu, "debug_barrier", lambda: None)
        monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


@contextlib.contextmanager
def mosaic_kernels() -> Iterator[None]:
    """Has Pallas interpret its Mosaic kernels, as an H100 would run them; not on a GPU."""
    if jax.default_backend() == "gpu":
        yield
        return
    params = mosaic_gpu.InterpretGPUParams(detect_races=True)
    with mosaic_gpu.force_gpu_interpret_mode(params), jax.sharding.use_abstract_mesh(H100):
        yield
