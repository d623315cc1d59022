"""A linear of a model with its LoRA: our operator, a fixed tile, the rivals, and the bare product.

T rows, D input width, E output width; the other letters are those of `lora_inputs`.

A run calls the operator on one layer after the other, with weights, inputs and adapters of its own,
and the runs take turns at the adapters, as long as there are others: caches do not hold what the
next call reads. Without weights it is the update alone.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import floors, lora_inputs
from benchmarks.gpu import Program
from benchmarks.lora_inputs import LAYERS, RTOL, Point, Pools, slots
from benchmarks.lora_rivals import GATHER_BYTES, RIVALS
from pallas_kernels.lora_matmul import (
    Counters,
    Part,
    RowTiles,
    base_product,
    compiler_options,
    lora_linear,
    lora_matmul,
)
from pallas_kernels.lora_matmul.measure import distance
from pallas_kernels.lora_matmul.tiles import ExpandTile, LoraTile, ShrinkTile, block_rows
from pallas_kernels.tuning.shapes import LinearShape

# Calls of a run have nothing to do with each other, unlike a model's layers: XLA may not make one
# kernel of several.
_EACH_CALL_ALONE = {
    "xla_disable_hlo_passes": "multi_output_fusion,gpu_horizontal_loop_fusion,"
    "gpu_horizontal_input_fusion,dot-merger"
}
LOOP_PAIRS = 128  # of products in a run of the loop over adapters, which take long to compile
# What a server without tuning would take: one tile for all shapes.
FIXED_TILE = LoraTile(
    block_rows=64,
    row_programs=264,
    shrink=ShrinkTile(block_k=32, block_ranks=64, rank_programs=1, splits=1, warps=4, stages=3),
    expand=ExpandTile(block_columns=64, blocks=1, block_ranks=32, warps=4, stages=3),
)


class Batches:
    """Inputs of a number of rows and weights, one each a call; no weights for updates alone."""

    def __init__(self, shape: LinearShape, tokens: int, *, weights: Sequence[jax.Array] | None):
        self._shape_TE = (tokens, sum(shape.columns))
        self.calls = Point(tokens=tokens, ranks=(1,)).calls
        keys = jax.random.split(jax.random.key(1), self.calls)
        self.x_TD = [jax.random.normal(k, (tokens, shape.width), jnp.bfloat16) for k in keys]
        self.w_DE = None if weights is None else list(weights[: self.calls])

    def results(self, calls: int) -> list[jax.Array]:
        """For runs to write to."""
        return [jnp.zeros(self._shape_TE, jnp.bfloat16) for _ in range(calls)]


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
    tokens, product = points[0].tokens, f"{name}/t{points[0].tokens}/product"
    if batches.w_DE is not None:
        run = functools.partial(_run, call=_product, calls=batches.calls)
        bare = Point(tokens=tokens, ranks=())
        variants = [(batches.x_TD, batches.w_DE, None)]
        yield _program(product, "product", pools, batches, bare, run, variants, model=model)
    for point in points:
        parts = pools.parts(point)
        for impl, call, calls, variants in _implementations(pools, parts, batches, point):
            run = functools.partial(_run, call=call, calls=calls)
            program = functools.partial(
                _program, f"{name}/{point.name}/{impl}", impl, pools, batches, point, run
            )
            yield program(variants, model=model, parts=parts, baseline=product)


def _program(
    name: str,
    impl: str,
    pools: Pools,
    batches: Batches,
    point: Point,
    run: functools.partial,
    variants: list[tuple[Any, ...]],
    *,
    model: str,
    parts: Sequence[Part] = (),
    baseline: str | None = None,
) -> Program:
    shape, ranks, calls = pools.shape, sorted(set(point.ranks)), run.keywords["calls"]
    how = dict(tokens=point.tokens, ranks=point.ranks, width=shape.width, columns=shape.columns)
    work = floors.lora(**how)
    if batches.w_DE is not None:
        work += floors.linear(tokens=point.tokens, weights=shape.width * sum(shape.columns))
    ours = impl in ("triton", "fixed-tile")
    return Program(
        name=name,
        fields=dict(
            model=model,
            op="lora" if batches.w_DE is not None else "pair",
            shape=name.rsplit("/", 2 if impl == "product" else 4)[0],
            batch=point.tokens,
            adapters=len(point.ranks),
            rank=ranks[0] if len(ranks) == 1 else ranks,
            rank_sum=sum(point.ranks),
            added_floor_ms=floors.adapters(**how).floor_ms,
            impl=impl,
        ),
        work=work,
        run=run,
        carry=functools.partial(batches.results, calls),
        variants=variants,
        calls=calls,
        error=functools.partial(_error, point, parts, batches),
        # As the engine compiles its steps; rivals and the product are XLA's own affair.
        compiler_options=_EACH_CALL_ALONE | (compiler_options(point.tokens) if ours else {}),
        baseline=baseline if batches.w_DE is not None else None,
    )


type Implementations = Iterator[tuple[str, Callable[..., Any], int, list[tuple[Any, ...]]]]


def _implementations(
    pools: Pools, parts: list[Part], batches: Batches, point: Point
) -> Implementations:
    """Name, what computes one call, calls of a run, and the variants of its arguments."""
    x_TD, w_DE, calls = batches.x_TD, batches.w_DE, batches.calls
    own_pools, columns = [part.pool for part in parts], tuple(part.column for part in parts)
    for impl, tile, height in (
        ("triton", None, block_rows(point.tokens)),
        ("fixed-tile", FIXED_TILE, 64),
    ):
        variants = [
            (x_TD, w_DE, (own_pools, RowTiles.of(slots(point, g), block_rows=height)))
            for g in range(point.groups)
        ]
        yield impl, functools.partial(_ours, tile=tile, columns=columns), calls, variants
    if len(parts) > 1:  # a rival takes a launch a linear: the kernel's own figures say enough
        return
    nth_T, gathered = slots(point, 0), point.tokens * max(point.ranks)
    stacked = functools.cache(functools.partial(lora_inputs.adapters, parts[0].pool, point))
    for impl, rival in RIVALS.items():
        width = pools.shape.width + sum(pools.shape.columns)
        if impl == "gather-bmm" and gathered * width * floors.ITEM_BYTES > GATHER_BYTES:
            continue
        count = min(calls, max(4, LOOP_PAIRS // len(point.ranks))) if impl == "loop" else calls
        variants = [
            (x_TD[:count], w_DE and w_DE[:count], ([stacked(g, n) for n in range(count)], nth_T))
            for g in range(point.groups)
        ]
        yield impl, functools.partial(_rival, rival=rival), count, variants


def _run(ys_TE, xs_TD, ws_DE, adapters, *, call: Callable[..., Any], calls: int):
    counters = Counters.new()
    del ys_TE  # memory for the results
    return [
        call(n, xs_TD[n], None if ws_DE is None else ws_DE[n], adapters, counters)
        for n in range(calls)
    ], None


def _product(n: int, x_TD, w_DE, adapters, counters) -> jax.Array:
    del n, adapters, counters
    return base_product(x_TD, w_DE, None)


def _ours(n: int, x_TD, w_DE, adapters, counters, *, tile, columns) -> jax.Array:
    pools, tiles = adapters
    parts = [Part(pool=pool, column=column) for pool, column in zip(pools, columns, strict=True)]
    how = dict(tiles=tiles, layer=n, implementation="triton")
    if w_DE is not None and tile is None:
        return lora_linear(x_TD, w_DE, parts, counters=counters, **how)
    if w_DE is None:  # XLA adds nothing to zeros
        stop = columns[-1] + pools[-1].b_RE.shape[1]
        return lora_matmul(jnp.zeros((len(x_TD), stop), x_TD.dtype), x_TD, parts, tile=tile, **how)
    return lora_matmul(base_product(x_TD, w_DE, None), x_TD, parts, tile=tile, **how)


def _rival(n: int, x_TD, w_DE, adapters, counters, *, rival) -> jax.Array:
    del counters
    stacked, nth_T = adapters
    update_TE = rival(x_TD, stacked[n], nth_T)
    return update_TE if w_DE is None else base_product(x_TD, w_DE, None) + update_TE


def _error(point: Point, parts: Sequence[Part], batches: Batches, returned) -> float:
    """The first call's largest error against float32, on some of its rows."""
    row_N = point.checked_rows()
    x_ND = batches.x_TD[0][row_N].astype(jnp.float32)
    want_NE = jnp.zeros((len(row_N), batches.results(1)[0].shape[1]))
    if batches.w_DE is not None:
        want_NE = jnp.dot(x_ND, batches.w_DE[0].astype(jnp.float32), precision="highest")
    for part in parts:
        update_NE = lora_inputs.update(part.pool, x_ND, slots(point, 0)[row_N], np.int32(0))
        stop = part.column + update_NE.shape[1]
        want_NE = want_NE.at[:, part.column : stop].add(update_NE)
    return float(distance(returned[0][0][row_N], want_NE, rtol=RTOL))
