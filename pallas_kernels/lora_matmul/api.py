"""The LoRA operator: adds the low-rank updates of each row's adapters to a base product.

    out_TE[t] = y_TE[t] + sum over branches (slot, sign) of row t's tile, pages p of the slot:
                sign * scale_LS[layer, slot] * (x_TD[t] @ A_p^T) @ B_p

A branch is the row's own adapter (+), or the adapter that is folded into the weights (-). A rank
page holds 16 rank rows of one adapter, for every layer; an adapter of rank r owns ceil(r / 16)
pages, so that memory and time follow the ranks in use. Linears that share an input are one call:
their outputs lie side by side in `y_TE`, each with a pool of its own.

T rows, D input width, E output width, L layers, S adapter slots, M row tiles.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lora_matmul import tiles_linear, triton, triton_linear, tuned, xla
from pallas_kernels.lora_matmul.layout import LoraPool, RowTiles
from pallas_kernels.lora_matmul.tiles import LoraTile, block_height
from pallas_kernels.tuning.table import Key, Segments

Implementation = Literal["triton", "xla"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One linear's share of a product: `y_TE[:, column : column + E_part]`, with its pool."""

    pool: LoraPool
    column: int


class Counters(NamedTuple):
    """What the programs of launches of `lora_linear` count in, one launch after the other."""

    arrived: jax.Ref
    spare: jax.Ref

    @classmethod
    def new(cls) -> "Counters":
        return cls(*(jax.new_ref(jnp.zeros(1, jnp.int32)) for _ in range(2)))


def block_rows(rows: int, *, implementation: Implementation, segments: Segments = "any") -> int:
    """Returns a height of row tiles for an implementation and a number of rows.

    The measured one on a device that has a table. `segments` is how many adapters the rows bring:
    "few", "some" and "many" are about 1, 8 and 32, "any" is for who cannot know.

    Raises:
      ValueError: the implementation is unknown.
      TableError: the device has a table, but it cannot be used.
    """
    match implementation:
        case "xla":
            return xla.BLOCK_ROWS
        case "triton":
            return tuned.block_rows(rows, segments=segments, device=_device())
    raise _unknown(implementation)


def lora_linear(
    x_TD: jax.Array,
    w_DE: jax.Array,
    parts: Sequence[Part],
    *,
    bias_E: jax.Array | None = None,
    tiles: RowTiles,
    layer: int,
    implementation: Implementation,
    segments: Segments = "any",
    counters: Counters | None = None,
) -> jax.Array:
    """Returns `x_TD @ w_DE + bias_E` plus each row's adapters, of linears that share an input.

    For few rows "triton" computes all of it in one launch. Otherwise it computes the updates first,
    and XLA may add them in the same pass as it multiplies.

    Args:
      x_TD: `[T, D]` input.
      w_DE: `[D, E]` base weights of the linears side by side.
      parts, tiles, layer, implementation, segments: as in `lora_matmul`.
      bias_E: `[E]`, added before the adapters.
      counters: shared by calls that follow each other; by default new ones, at the cost of one
        more launch.

    Returns:
      `[T, E]` in the dtype of `x_TD`; sums are float32.

    Raises:
      ValueError, NotImplementedError, TableError: as `lora_matmul`.
    """
    (T, D), E = x_TD.shape, w_DE.shape[1]
    if w_DE.shape[0] != D:
        raise ValueError(f"w_DE is for inputs of width {w_DE.shape[0]}, x_TD has {D}")
    few = T <= tiles_linear.MAX_ROWS and w_DE.dtype == x_TD.dtype
    if implementation == "triton" and few and parts:
        _check(parts, tiles, T=T, D=D, E=E, layer=layer)
        return _in_one_launch(
            x_TD,
            w_DE,
            bias_E,
            parts,
            tiles=tiles,
            layer=layer,
            segments=segments,
            counters=counters or Counters.new(),
        )
    if implementation == "triton":
        # Or XLA makes x, the end of a norm say, once for the product and once for the kernel; and a
        # product with the bias, to which the updates are added in another pass.
        x_TD, bias_E = jax.lax.optimization_barrier((x_TD, bias_E))
    return lora_matmul(
        base_product(x_TD, w_DE, bias_E),
        x_TD,
        parts,
        tiles=tiles,
        layer=layer,
        implementation=implementation,
        segments=segments,
    )


def _in_one_launch(
    x_TD: jax.Array,
    w_DE: jax.Array,
    bias_E: jax.Array | None,
    parts: Sequence[Part],
    *,
    tiles: RowTiles,
    layer: int,
    segments: Segments,
    counters: Counters,
) -> jax.Array:
    (T, D), E = x_TD.shape, w_DE.shape[1]
    cut = tuned.linear_tile_for(
        Key(op=tuned.LINEAR, width=D, columns=E, tokens=T, segments=segments),
        parts=len(parts),
        tile_rows=block_height(tiles.block_rows),
        itemsize=x_TD.dtype.itemsize,
        device=_device(),
    )
    arrived, spare = counters
    y_TE, arrived[...], spare[...] = triton_linear.lora_linear(
        x_TD,
        w_DE,
        bias_E,
        tuple(p.pool for p in parts),
        tiles,
        np.int32(layer),
        arrived[...],
        spare[...],
        columns=tuple(p.column for p in parts),
        cut=cut,
    )
    return y_TE


def base_product(x_TD: jax.Array, w_DE: jax.Array, bias_E: jax.Array | None) -> jax.Array:
    """Returns `x_TD @ w_DE + bias_E`, `[T, E]` in the dtype of `x_TD`; sums are float32."""
    # Of that dtype from the start: a float32 result is written, read again and rounded in another
    # pass over it, which took a tenth of a prompt's step on a GPU.
    y_TE = jnp.dot(x_TD, w_DE, preferred_element_type=x_TD.dtype)
    return y_TE if bias_E is None else y_TE + bias_E.astype(y_TE.dtype)


def lora_matmul(
    y_TE: jax.Array,
    x_TD: jax.Array,
    parts: Sequence[Part],
    *,
    tiles: RowTiles,
    layer: int,
    implementation: Implementation,
    segments: Segments = "any",
    tile: LoraTile | None = None,
) -> jax.Array:
    """Adds each row's adapters to the base products of linears that share an input.

    Args:
      y_TE: `[T, E]` base products side by side.
      x_TD: `[T, D]` input of the linears; `y_TE` has its dtype, or is float32.
      parts: pools, and where their outputs lie; columns of no part stay as they are. Pools are
        cast to the dtype of `x_TD` where they differ.
      tiles: which rows multiply which adapters. Their values are on the device and are not
        checked.
      layer: which layer's rows of each page to use, in `[0, layers)`.
      implementation: "triton" for NVIDIA GPUs, "xla" anywhere.
      segments: how many adapters the rows bring; see `block_rows`. It chooses the tile, nothing
        else: any number of them is right.
      tile: shape of the "triton" kernels' blocks; by default the measured one of the nearest shape,
        or a computed one on a device without a table.

    Returns:
      `[T, E]` in the dtype of `y_TE`; products accumulate in float32, in an order that depends on
      the tile alone: equal inputs give equal bits.

    Raises:
      ValueError: the shapes contradict each other, parts overlap, or the implementation is unknown.
      NotImplementedError: the "triton" kernels do not take these shapes or dtypes; "xla" does.
      TableError: the device has a table of tiles, but it cannot be used.
    """
    (T, D), E = x_TD.shape, y_TE.shape[1]
    if y_TE.shape[0] != T:
        raise ValueError(f"row counts differ: x_TD has {T}, y_TE {y_TE.shape[0]}")
    _check(parts, tiles, T=T, D=D, E=E, layer=layer)
    if not parts:
        return y_TE
    pools, columns = tuple(p.pool for p in parts), tuple(p.column for p in parts)
    match implementation:
        case "xla":
            return xla.lora_matmul(y_TE, x_TD, pools, tiles, np.int32(layer), columns=columns)
        case "triton":
            if tile is None:
                tile = tuned.lora_tile_for(
                    Key(op=tuned.LORA, width=D, columns=E, tokens=T, segments=segments),
                    block_rows=block_height(tiles.block_rows),
                    itemsize=y_TE.dtype.itemsize,
                    device=_device(),
                )
            return y_TE + triton.lora_update(
                x_TD,
                pools,
                tiles,
                np.int32(layer),
                columns=columns,
                E=E,
                dtype=y_TE.dtype,
                tile=tile,
            )
    raise _unknown(implementation)


def compiler_options(rows: int) -> dict[str, bool]:
    """Returns XLA's options for a program whose linears have so many rows and go through "triton".

    Above those of one launch, products go to cuBLAS, which adds the updates of adapters in the same
    pass; XLA's own kernels, quicker at few rows, leave that to a pass of its own.
    """
    return {"xla_gpu_triton_gemm_any": rows <= tiles_linear.MAX_ROWS}


def _check(parts: Sequence[Part], tiles: RowTiles, *, T: int, D: int, E: int, layer: int) -> None:
    if (rows := tiles.first_M.shape[0]) != T:
        raise ValueError(f"row counts differ: x_TD has {T}, the row tiles {rows}")
    for part in parts:
        pool, stop = part.pool, part.column + part.pool.b_RE.shape[1]
        if pool.a_RD.shape[1] != D:
            raise ValueError(f"pool is for inputs of width {pool.a_RD.shape[1]}, x_TD has {D}")
        if not 0 <= part.column <= stop <= E:
            raise ValueError(f"columns {part.column}:{stop} of a part exceed y_TE's {E}")
        if not 0 <= layer < (layers := pool.scale_LS.shape[0]):
            raise ValueError(f"layer={layer} is not in [0, {layers})")
    spans = sorted((p.column, p.column + p.pool.b_RE.shape[1]) for p in parts)
    for (first, stop), (next_first, next_stop) in itertools.pairwise(spans):
        if next_first < stop:
            raise ValueError(
                f"parts overlap: columns {first}:{stop} and {next_first}:{next_stop}; give each "
                "linear columns of its own"
            )


def _unknown(implementation: str) -> ValueError:
    known = ", ".join(map(repr, get_args(Implementation)))
    return ValueError(f"unknown implementation {implementation!r}; known: {known}")


def _device() -> str:
    return jax.devices()[0].device_kind
