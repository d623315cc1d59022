"""How adapters lie in device memory, and which rows of a step multiply which of them.

S adapter slots, W pages a slot, R = layers * pages * 16 rank rows, D and E a linear's widths,
T rows, M row tiles.
"""

import dataclasses

import jax
import jax.numpy as jnp

PAGE_RANKS = 16
MAX_RANK = 256  # of one adapter in one linear, where a kernel must bound it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraPool:
    """The device's rank pages for one kind of linear, and who owns them.

    Attributes:
      a_RD: `[layers * pages * 16, D]`; page p of layer l starts at row
        `(l * pages + p) * PAGE_RANKS`. Page 0 is zeros.
      b_RE: `[layers * pages * 16, E]`, laid out alike (B transposed: a rank row is contiguous).
      scale_LS: `[layers, slots]` float32, alpha / r of the adapter in each slot.
      page_SW: `[slots, W]` int32 ids of each slot's pages, in the order of its ranks.
      pages_S: `[slots]` int32, how many of them there are.
    """

    a_RD: jax.Array
    b_RE: jax.Array
    scale_LS: jax.Array
    page_SW: jax.Array
    pages_S: jax.Array

    @property
    def layer_pages(self) -> int:
        """Pages of one layer."""
        return self.a_RD.shape[0] // (self.scale_LS.shape[0] * PAGE_RANKS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RowTiles:
    """Runs of neighbouring rows that bring the same adapter, cut into tiles.

    Any order of rows is right; rows sorted by adapter make the fewest tiles.

    Attributes:
      first_M: `[M]` int32 first row of each tile, ascending among those in use.
      len_M: `[M]` int32 rows in it, 1 to `block_rows`.
      plus_M: `[M]` int32 slot of the adapter that is added, -1 for none.
      minus_M: `[M]` int32 slot of the adapter that is subtracted because it is folded into the
        base product, -1 for none.
      count: scalar int32, tiles in use.
      idle: scalar int32, tiles after them, of rows that have nothing to add or subtract, so that
        all rows are in one. What comes after both is anything.
      block_rows: the height of a tile.
    """

    first_M: jax.Array
    len_M: jax.Array
    plus_M: jax.Array
    minus_M: jax.Array
    count: jax.Array
    idle: jax.Array
    block_rows: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls, adapter_T: jax.Array, *, merged: jax.Array | int = -1, block_rows: int
    ) -> "RowTiles":
        """Cuts rows into tiles, those with nothing to add or subtract into tiles of their own.

        Args:
          adapter_T: `[T]` int32 adapter slot of each row, -1 for the base model.
          merged: scalar int32 slot of the adapter that is folded into the base product, or -1. Its
            own rows need nothing, all others its negative.
          block_rows: most rows of a tile.
        """
        T = adapter_T.shape[0]
        merged = jnp.asarray(merged, jnp.int32)
        row_T = jnp.arange(T, dtype=jnp.int32)
        previous_T = jnp.concatenate([adapter_T[:1] - 1, adapter_T[:-1]])
        changes_T = adapter_T != previous_T
        run_start_T = jax.lax.cummax(jnp.where(changes_T, row_T, 0))
        starts_T = (row_T - run_start_T) % block_rows == 0
        works_T = (adapter_T != merged) & ((adapter_T >= 0) | (merged >= 0))
        starts_2T = jnp.stack([starts_T & works_T, starts_T & ~works_T])
        nth_2T = jnp.cumsum(starts_2T, axis=1, dtype=jnp.int32)
        count, idle = nth_2T[:, -1]
        tile_T = jnp.where(works_T, nth_2T[0], count + nth_2T[1]) - 1
        # As many tiles as rows: of unsorted rows, each can be one. Unused ones cost nothing.
        first_M = jnp.full(T, T, jnp.int32).at[jnp.where(starts_T, tile_T, T)].set(row_T)
        len_M = jnp.zeros(T, jnp.int32).at[tile_T].add(1)
        plus_M = adapter_T[jnp.minimum(first_M, T - 1)]
        return cls(
            first_M=first_M,
            len_M=len_M,
            plus_M=plus_M,
            minus_M=jnp.broadcast_to(merged, (T,)),
            count=count,
            idle=idle,
            block_rows=block_rows,
        )
