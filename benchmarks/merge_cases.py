"""Merging one adapter of rank 64 into all linears of a model, layer by layer, and a plain copy.

A few layers are timed, of weights far larger than any cache; the figure is scaled to all layers.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import floors
from benchmarks.gpu import Program
from pallas_kernels.lora_matmul import MAX_RANK, PAGE_RANKS, LoraPool, Part
from pallas_kernels.lora_merge import lora_merge
from pallas_kernels.tuning.shapes import MODELS, LinearShape

TIMED_LAYERS, RANK = 8, 64
PAGES = RANK // PAGE_RANKS
CHECKED_ROWS = 256
# Half a unit in the last of 8 significant bits: one rounding, and a hair for float32's own.
RTOL = 1.01 * 2**-8


def programs(model: str) -> Iterator[Program]:
    shape = MODELS[model]
    linears = shape.linears
    inputs = functools.cache(functools.partial(_inputs, list(linears.values())))
    one_layer = [
        floors.merge(rank=RANK, width=linear.width, columns=columns)
        for linear in linears.values()
        for columns in linear.columns
    ]
    for impl in ("mosaic", "triton", "xla", "copy"):
        yield Program(
            name=f"merge/{model}/{impl}",
            fields=dict(
                model=model,
                op="merge",
                shape="all linears",
                batch=0,
                adapters=1,
                rank=RANK,
                impl=impl,
                timed_layers=TIMED_LAYERS,
            ),
            work=sum(one_layer, floors.Work(0, 0)) * shape.layers,
            run=functools.partial(_run, impl=impl),
            carry=lambda: jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), inputs()[0]),
            inputs=inputs,
            calls=TIMED_LAYERS / shape.layers,
            error=None if impl == "copy" else functools.partial(_error, inputs),
        )


def _inputs(linears: Sequence[LinearShape]) -> tuple[list[list[jax.Array]], list[list[LoraPool]]]:
    """Base weights of each layer and linear, and each linear's pools."""
    keys = jax.random.split(jax.random.key(0), (TIMED_LAYERS, len(linears)))
    base_DE = [
        [_weights(key, linear) for key, linear in zip(layer, linears, strict=True)]
        for layer in keys
    ]
    pools = [[_pool(linear.width, columns) for columns in linear.columns] for linear in linears]
    return base_DE, pools


def _parts(pools: list[LoraPool]) -> list[Part]:
    columns = itertools.accumulate((p.b_RE.shape[1] for p in pools), initial=0)
    return [Part(pool=pool, column=c) for pool, c in zip(pools, columns, strict=False)]


def _run(merged_DE, base_DE, pools, *, impl):
    if impl == "copy":  # with a new sign: XLA leaves out what changes nothing
        return jax.tree.map(jnp.negative, base_DE), None
    return [
        [
            lora_merge(*copy_and_base, _parts(own), layer=layer, slot=0, implementation=impl)
            for own, *copy_and_base in zip(pools, merged, base, strict=True)
        ]
        for layer, (merged, base) in enumerate(zip(merged_DE, base_DE, strict=True))
    ], None


@functools.partial(jax.jit, static_argnames="linear")
def _weights(key, linear: LinearShape) -> jax.Array:
    shape_DE = (linear.width, sum(linear.columns))
    return jax.random.normal(key, shape_DE, jnp.bfloat16) * jnp.bfloat16(linear.width**-0.5)


@functools.partial(jax.jit, static_argnames=("width", "columns"))
def _pool(width: int, columns: int) -> LoraPool:
    key_a, key_b = jax.random.split(jax.random.key(1))
    rows, own = TIMED_LAYERS * (1 + PAGES) * PAGE_RANKS, jnp.arange(1, 1 + PAGES)
    return LoraPool(
        a_RD=jax.random.normal(key_a, (rows, width), jnp.bfloat16) * jnp.bfloat16(width**-0.5),
        b_RE=jax.random.normal(key_b, (rows, columns), jnp.bfloat16) * jnp.bfloat16(0.1),
        scale_LS=jnp.ones((TIMED_LAYERS, 1)),
        page_SW=jnp.zeros((1, MAX_RANK // PAGE_RANKS), jnp.int32).at[:, :PAGES].set(own),
        pages_S=jnp.array([PAGES]),
    )


def _error(inputs, returned) -> float:
    """Largest error of the last layer against float32, on some rows of every linear."""
    base_DE, pools = inputs()
    return max(
        float(_distance(merged, base, _parts(own)))
        for merged, base, own in zip(returned[0][-1], base_DE[-1], pools, strict=True)
    )


def _distance(got_DE, base_DE, parts) -> jax.Array:
    row_N = np.linspace(0, base_DE.shape[0] - 1, CHECKED_ROWS).astype(np.int32)
    want_NE = base_DE[row_N].astype(jnp.float32)
    for part in parts:
        # Pages 1 to PAGES of the last layer are the last rows.
        a_RN, b_RE = (x[-RANK:].astype(jnp.float32) for x in (part.pool.a_RD, part.pool.b_RE))
        update_NE = jnp.dot(a_RN[:, row_N].T, b_RE, precision=jax.lax.Precision.HIGHEST)
        want_NE = want_NE.at[:, part.column : part.column + b_RE.shape[1]].add(update_NE)
    # Near zero, the sum's own error in float32 is larger than the rounding.
    allowed_NE = RTOL * jnp.maximum(abs(want_NE), want_NE.std() / 256)
    return (abs(got_DE[row_N].astype(jnp.float32) - want_NE) / allowed_NE).max()
