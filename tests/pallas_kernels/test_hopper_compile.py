"""Tiles compile for an H100 that is not there; needs `requirements/hopper.txt`, see the Makefile.

The CUDA plugin compiles for a described device as it does for a real one, ptxas included, but
without trying which way is fastest. Where it is not installed, the lowering tests remain, unless
NEEDS_CUDA_PLUGIN says that it has to be there.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import lora_matmul as op
from pallas_kernels.lora_matmul import api, tiles, tiles_linear, triton_linear
from pallas_kernels.lora_merge import lora_merge
from pallas_kernels.tuning.shapes import LinearShape
from tests.pallas_kernels.test_lora_lowering import LINEARS, columns_of, pool_shapes
from tests.pallas_kernels.test_tuned_tables import PARTS, Call, calls, program_of

# What XLA asks of a device, from a real one.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  threads_per_core_limit: 2048
  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 feature_extension: 2 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 19 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture(scope="module")
def compiled():
    """Compiles a function, given shapes."""
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology="1x1x1", target_config=H100
        )
    except (NotImplementedError, RuntimeError) as error:
        if os.environ.get("NEEDS_CUDA_PLUGIN"):
            raise
        pytest.skip(f"the CUDA plugin does not compile here: {error}")
    mesh = Mesh(np.array(topology.devices), ("gpus",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def compile_fn(fn, *shapes, **options):
        here = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes
        )
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.jit(fn).lower(*here).compile(compiler_options=options)

    # What a described device compiled cannot be read back from a cache of compilations. jax asks
    # once whether there is one, so a test before this one may have had the answer.
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield compile_fn
    jax.config.update("jax_enable_compilation_cache", cached)
    compilation_cache.reset_cache()


def shapes_of(width, widths, rows):
    """Of x, the pools, and the rows' adapters."""
    pools = tuple(pool_shapes(width, columns, jnp.bfloat16) for columns in widths)
    return (
        jax.ShapeDtypeStruct((rows, width), jnp.bfloat16),
        pools,
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )


@pytest.mark.parametrize(("rows", "with_bias"), [(640, False), (4096, False), (576, True)])
@pytest.mark.parametrize(("width", "widths"), LINEARS.values(), ids=LINEARS.keys())
def test_the_product_of_a_prompt_adds_the_updates_in_place(
    compiled, width, widths, rows, with_bias, monkeypatch
):
    monkeypatch.setattr(api, "_device", lambda: "NVIDIA H100 80GB HBM3")

    def multiply(x_TD, w_DE, bias_E, pools, adapter_T):
        row_tiles = op.RowTiles.of(adapter_T, block_rows=tiles.block_rows(rows))
        parts = [op.Part(pool=p, column=c) for p, c in zip(pools, columns_of(widths), strict=True)]
        how = dict(tiles=row_tiles, layer=1, implementation="triton")
        return op.lora_linear(x_TD, w_DE, parts, bias_E=bias_E if with_bias else None, **how)

    x_TD, pools, adapter_T = shapes_of(width, widths, rows)
    w_DE = jax.ShapeDtypeStruct((width, sum(widths)), x_TD.dtype)
    bias_E = jax.ShapeDtypeStruct(w_DE.shape[1:], x_TD.dtype)
    shapes = (x_TD, w_DE, bias_E, pools, adapter_T)
    text = compiled(multiply, *shapes, **op.compiler_options(rows)).as_text()
    assert "lora_shrink" in text
    assert "lora_expand" in text
    (product,) = (line for line in text.splitlines() if 'custom_call_target="__cublas' in line)
    assert '"beta":1' in product
    assert "output_to_operand_aliasing={{0}: (2, {})}" in product
    assert ('"epilogue":"BIAS"' in product) == with_bias
    assert f"bf16[{rows},{sum(widths)}]{{1,0}} fusion(" not in text


@pytest.mark.parametrize("rows", [1, tiles_linear.MAX_ROWS])
@pytest.mark.parametrize(("width", "widths"), LINEARS.values(), ids=LINEARS.keys())
def test_the_linear_of_a_decode(compiled, width, widths, rows):
    E = sum(widths)
    how = dict(width=width, columns=E, parts=len(widths), itemsize=2)
    cut = tiles_linear.linear_tile(rows=rows, **how)

    def multiply(x_TD, w_DE, bias_E, pools, adapter_T, arrived, spare):
        row_tiles = op.RowTiles.of(adapter_T, block_rows=16)
        base, layer = (x_TD, w_DE, bias_E), np.int32(1)
        how = dict(columns=columns_of(widths), cut=cut)
        return triton_linear.lora_linear(*base, pools, row_tiles, layer, arrived, spare, **how)

    x_TD, pools, adapter_T = shapes_of(width, widths, rows)
    base = [jax.ShapeDtypeStruct(shape, x_TD.dtype) for shape in ((width, E), (E,))]
    counter = jax.ShapeDtypeStruct((1,), jnp.int32)
    text = compiled(multiply, x_TD, *base, pools, adapter_T, counter, counter).as_text()
    assert "lora_linear" in text


@pytest.mark.parametrize(("width", "widths"), LINEARS.values(), ids=LINEARS.keys())
def test_a_merge(compiled, width, widths):
    _, pools, _ = shapes_of(width, widths, 1)
    w_DE = jax.ShapeDtypeStruct((width, sum(widths)), jnp.bfloat16)

    def merge(merged_DE, base_DE, pools):
        parts = [op.Part(pool=p, column=c) for p, c in zip(pools, columns_of(widths), strict=True)]
        fill = functools.partial(lora_merge, layer=1, slot=0, implementation="mosaic")
        return fill(merged_DE, base_DE, parts)

    text = compiled(merge, w_DE, w_DE, pools).as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 1
    assert "copy(" not in text


def one_call_a_tile() -> list[Call]:
    """Each tile once, where it has the most rows and columns; every call lowers in another test.

    Tiles are alike that differ in `row_programs`, how often the same code is launched. Linears that
    share an input are one here: three take three times as long to compile, and are tested above.
    """
    rising = sorted(calls(), key=lambda call: (call.tokens, sum(call.linear.columns)))
    largest = {dataclasses.replace(call.tile, row_programs=1): call for call in rising}
    return [
        call._replace(linear=LinearShape(call.linear.width, (sum(call.linear.columns),)))
        for call in largest.values()
    ]


@pytest.mark.parametrize("part", range(PARTS))
def test_tiles_of_tables(compiled, part):
    for call in one_call_a_tile()[part::PARTS]:
        fn, shapes = program_of(call)
        assert "lora_" in compiled(fn, *shapes).as_text()
