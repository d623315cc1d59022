"""A linear of a model with its LoRA: our operator, a fixed tile, the rivals, and the bare product.

T rows, D input width, E output width; the other letters are those of `lora_inputs`.

A run calls the operator on one layer after the other, with weights, inputs and adapters of its own,
several times what a cache holds. As in a model, no call begins before the one before it has ended
and its own input has been written.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import floors, lora_inputs
from benchmarks.gpu import Program
from benchmarks.lora_inputs import LAYERS, RTOL, Point, Pools, slots
from benchmarks.lora_rivals import RIVALS, Adapters, suits
from pallas_kernels.lora_matmul import (
    Counters,
    LoraPool,
    Part,
    RowTiles,
    base_product,
    compiler_options,
    lora_linear,
    lora_matmul,
)
from pallas_kernels.lora_matmul.measure import after, distance
from pallas_kernels.lora_matmul.tiles import ExpandTile, LoraTile, ShrinkTile, block_rows
from pallas_kernels.lora_matmul.tiles_linear import MAX_ROWS
from pallas_kernels.tuning.shapes import LinearShape

# XLA may not make one kernel of what several calls do without their inputs, such as to gather
# adapters.
_EACH_CALL_ALONE = {
    "xla_disable_hlo_passes": "multi_output_fusion,gpu_horizontal_loop_fusion,"
    "gpu_horizontal_input_fusion,dot-merger"
}
# What a server without tuning would take: one tile for all shapes.
FIXED_TILE = LoraTile(
    block_rows=64,
    row_programs=264,
    shrink=ShrinkTile(block_k=32, block_ranks=64, rank_programs=1, splits=1, warps=4, stages=3),
    expand=ExpandTile(block_columns=64, blocks=1, block_ranks=32, warps=4, stages=3),
)


class Batches:
    """Inputs of a number of rows and weights, for each layer."""

    def __init__(self, shape: LinearShape, tokens: int, *, weights: Callable[[], list[jax.Array]]):
        self._shape, self._weights = shape, weights
        self.bare = Point(tokens=tokens, ranks=())

    @property
    def weights(self) -> list[jax.Array]:
        """`[D, E]` each."""
        return self._weights()[: self.bare.layers]

    def carry(self) -> tuple[list[jax.Array], list[jax.Array]]:
        """Results of all calls to write to, `[T, E]` each, and inputs of all layers, `[T, D]`."""
        shape_TD = (self.bare.tokens, self._shape.width)
        shape_TE = (self.bare.tokens, sum(self._shape.columns))
        keys = jax.random.split(jax.random.key(1), self.bare.layers)
        ys_TE = [jnp.zeros(shape_TE, jnp.bfloat16) for _ in range(self.bare.calls)]
        xs_TD = [jax.random.normal(key, shape_TD, jnp.bfloat16) for key in keys]
        return ys_TE, xs_TD


@functools.partial(jax.jit, static_argnames="shape")
def _weight(key, shape: tuple[int, int]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(shape[0] ** -0.5)


def weights(shape: LinearShape) -> list[jax.Array]:
    """Of all layers, `[D, E]` each."""
    size = (shape.width, sum(shape.columns))
    return [_weight(key, size) for key in jax.random.split(jax.random.key(3), LAYERS)]


def programs(
    pools: Pools, batches: Batches, points: Sequence[Point], *, name: str, model: str
) -> Iterator[Program]:
    """Every implementation at every point; all points have as many tokens as `batches`."""
    product = f"{name}/t{batches.bare.tokens}/product"
    program = functools.partial(_program, pools, batches, model=model)
    bare = dict(name=product, impl="product", call=_product, adapters=lambda: None)
    yield program(batches.bare, **bare)
    for point in points:
        parts = functools.cache(functools.partial(pools.parts, point))
        for impl, call, adapters in _implementations(pools, parts, point):
            yield program(
                point,
                name=f"{name}/{point.name}/{impl}",
                impl=impl,
                call=call,
                adapters=adapters,
                parts=parts,
                baseline=product,
            )


def _program(
    pools: Pools,
    batches: Batches,
    point: Point,
    *,
    name: str,
    model: str,
    impl: str,
    call: Callable[..., jax.Array],
    adapters: Callable[[], Any],
    parts: Callable[[], Sequence[Part]] = tuple,
    baseline: str | None = None,
) -> Program:
    """One that brings `adapters()` to every `call`."""
    shape, ranks = pools.shape, sorted(set(point.ranks))
    how = dict(tokens=point.tokens, ranks=point.ranks, width=shape.width, columns=shape.columns)
    weights = shape.width * sum(shape.columns)
    work = floors.lora(**how) + floors.linear(tokens=point.tokens, weights=weights)
    ours = impl not in ("product", *RIVALS)
    return Program(
        name=name,
        fields=dict(
            model=model,
            op="lora",
            shape=name.rsplit("/", 2 if impl == "product" else 4)[0],
            batch=point.tokens,
            adapters=len(point.ranks),
            rank=ranks[0] if len(ranks) == 1 else ranks,
            rank_sum=sum(point.ranks),
            added_floor_ms=floors.adapters(**how).floor_ms,
            impl=impl,
        ),
        work=work,
        run=functools.partial(_run, call=call),
        carry=batches.carry,
        inputs=lambda: (batches.weights, adapters()),
        calls=point.calls,
        error=functools.partial(_error, point, parts, batches),
        # As the engine compiles its steps; rivals and the product are XLA's own affair.
        compiler_options=_EACH_CALL_ALONE | (compiler_options(point.tokens) if ours else {}),
        baseline=baseline,
    )


def _implementations(
    pools: Pools, parts: Callable[[], list[Part]], point: Point
) -> Iterator[tuple[str, Callable[..., jax.Array], Callable[[], Any]]]:
    """Name, what computes one call, and what makes the adapters that it takes."""

    def ours(height: int) -> tuple[list[LoraPool], RowTiles]:
        return [part.pool for part in parts()], RowTiles.of(slots(point), block_rows=height)

    @functools.cache
    def stacked() -> tuple[list[Adapters], jax.Array]:
        return lora_inputs.adapters(parts()[0].pool, point), slots(point)

    columns, height = (0, *itertools.accumulate(pools.shape.columns))[:-1], block_rows(point.tokens)
    yield "triton", functools.partial(_ours, columns=columns), functools.partial(ours, height)
    two_launches = functools.partial(_two_launches, columns=columns)
    if point.tokens <= MAX_ROWS:
        yield "two-launches", two_launches, functools.partial(ours, height)
    fixed = functools.partial(two_launches, tile=FIXED_TILE)
    yield "fixed-tile", fixed, functools.partial(ours, FIXED_TILE.block_rows)
    if len(columns) > 1:  # a rival takes a launch a linear: the kernel's own figures say enough
        return
    for impl, rival in RIVALS.items():
        if suits(impl, tokens=point.tokens, adapters=len(point.ranks)):
            yield impl, functools.partial(_rival, rival=rival), stacked


def _run(carry, ws_DE, adapters, *, call: Callable[..., jax.Array]):
    ys_TE, xs_TD = carry
    xs_TD, returned = list(xs_TD), []
    counters = Counters.new()
    for n in range(len(ys_TE)):  # they are memory for the results
        layer = n % len(xs_TD)
        if returned:
            xs_TD[layer], returned[-1] = after(xs_TD[layer], returned[-1])
        returned.append(call(layer, xs_TD[layer], ws_DE[layer], adapters, counters))
    return (returned, xs_TD), None


def _product(layer: int, x_TD, w_DE, adapters, counters) -> jax.Array:
    del layer, adapters, counters
    return base_product(x_TD, w_DE, None)


def _ours(layer: int, x_TD, w_DE, adapters, counters, *, columns) -> jax.Array:
    """As the engine calls it: in one launch for few rows."""
    parts, tiles = _parts(adapters, columns)
    how = dict(tiles=tiles, layer=layer, implementation="triton")
    return lora_linear(x_TD, w_DE, parts, counters=counters, **how)


def _two_launches(layer: int, x_TD, w_DE, adapters, counters, *, columns, tile=None) -> jax.Array:
    """Shrink and expand, then the product, which adds what they made."""
    del counters
    parts, tiles = _parts(adapters, columns)
    how = dict(tiles=tiles, layer=layer, implementation="triton", tile=tile)
    return lora_matmul(base_product(x_TD, w_DE, None), x_TD, parts, **how)


def _parts(adapters, columns) -> tuple[list[Part], RowTiles]:
    pools, tiles = adapters
    parts = [Part(pool=pool, column=column) for pool, column in zip(pools, columns, strict=True)]
    return parts, tiles


def _rival(layer: int, x_TD, w_DE, adapters, counters, *, rival) -> jax.Array:
    del counters
    stacked, nth_T = adapters
    return base_product(x_TD, w_DE, None) + rival(x_TD, stacked[layer], nth_T)


def _error(point: Point, parts: Callable[[], Sequence[Part]], batches: Batches, returned) -> float:
    """The first call's largest error against float32, on some of its rows."""
    (got_TE, *_), (x_TD, *_) = returned[0]
    row_N = point.checked_rows()
    x_ND = x_TD[row_N].astype(jnp.float32)
    want_NE = jnp.dot(x_ND, batches.weights[0].astype(jnp.float32), precision="highest")
    for part in parts():
        update_NE = lora_inputs.update(part.pool, x_ND, slots(point)[row_N], np.int32(0))
        stop = part.column + update_NE.shape[1]
        want_NE = want_NE.at[:, part.column : stop].add(update_NE)
    return float(distance(got_TE[row_N], want_NE, rtol=RTOL))
