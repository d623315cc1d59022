"""How adapters lie in device memory: rank pages, and the list of those that a step uses.

S adapter slots, P pages, R = layers * pages * 16 rank rows, D and E the linear's widths.
"""

import dataclasses

import jax

PAGE_RANKS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraPool:
    """The device's rank pages for one kind of linear.

    Attributes:
      a_RD: `[layers * pages * 16, D]`; page p of layer l starts at row
        `(l * pages + p) * PAGE_RANKS`.
        Page 0 is zeros.
      b_RE: `[layers * pages * 16, E]`, laid out alike (B transposed: a rank row is contiguous).
      scale_LS: `[layers, slots]` float32, alpha / r of the adapter in each slot.
    """

    a_RD: jax.Array
    b_RE: jax.Array
    scale_LS: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ActivePages:
    """The pages that one step uses at one kind of linear.

    Attributes:
      page_P: `[P]` int32 page ids; only the first `count` are read.
      owner_P: `[P]` int32, the adapter slot that owns each page.
      count: scalar int32, how many pages are active.
    """

    page_P: jax.Array
    owner_P: jax.Array
    count: jax.Array
