"""Merging as one Pallas-Mosaic launch on Hopper GPUs: weights are copied, and updated on the way.

A program owns a strip of columns, of one part or of a gap between parts, and goes down some blocks
of its rows. It keeps the strip's rows of B; blocks of the base and of A come in ahead of time by
the copy engine. The update is added where a block of the base lies, and from there it is stored.
d and e are one block of D and E, r the ranks of one product, x the blocks in shared memory; the
other letters are those of `api`.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lora_matmul.layout import PAGE_RANKS, LoraPool

STEP_PAGES = 4  # of one product; an adapter of more pages waits for those of the second and so on
STEP_RANKS = STEP_PAGES * PAGE_RANKS
BLOCK_D = 64
WIDEST_BLOCK_E, NARROWEST_BLOCK_E = 128, 64
BLOCKS = 8  # of rows that a program goes down, at most
PLACES = 3  # blocks that are on their way in or out at a time


def refusal(base_DE: jax.Array, pools: Sequence[LoraPool], columns: Sequence[int]) -> str | None:
    """Why these cannot be merged by this implementation; None if they can."""
    if base_DE.dtype not in ("bfloat16", "float16"):
        return f"the weights are {base_DE.dtype}"
    if any(x.dtype != base_DE.dtype for pool in pools for x in (pool.a_RD, pool.b_RE)):
        return f"pools have another dtype than {base_DE.dtype}"
    if not pools:
        return "there are no parts"
    if base_DE.shape[0] % BLOCK_D:
        return f"D={base_DE.shape[0]} is no multiple of {BLOCK_D}"
    if _common_divisor(base_DE.shape[1], pools, columns) % NARROWEST_BLOCK_E:
        return f"parts or gaps between them are no multiples of {NARROWEST_BLOCK_E} columns"
    return None


def _common_divisor(E: int, pools: Sequence[LoraPool], columns: Sequence[int]) -> int:
    """Of the columns in which parts and gaps begin and end."""
    return math.gcd(E, *columns, *(pool.b_RE.shape[1] for pool in pools))


class _Strip:
    """The columns of one program: which adapter is added there, and how it is loaded."""

    def __init__(self, layer, slot, pools, block, *, first_blocks, block_e: int):
        """Args:
        layer, slot: of the adapter's rows.
        pools: of the parts, on the device.
        block: which of the blocks of columns it is.
        first_blocks: of each part.
        """
        self.pools, self.block_e = pools, block_e
        self.layer, self.slot = layer, slot
        # In a gap: no pages of the first part.
        self.owner, self.block = jnp.int32(0), jnp.int32(0)
        self.pages, self.scale = jnp.int32(0), jnp.float32(0)
        for i, (pool, first) in enumerate(zip(pools, first_blocks, strict=True)):
            inside = (block >= first) & (block < first + pool.b_RE.shape[1] // block_e)
            self.owner = jnp.where(inside, i, self.owner)
            self.block = jnp.where(inside, block - first, self.block)
            self.pages = jnp.where(inside, pool.pages_S[self.slot], self.pages)
            self.scale = jnp.where(inside, pool.scale_LS[self.layer, self.slot], self.scale)

        # Looked up once, for all blocks of A.
        self.first_pages = self.pages_of(0)

    def pages_of(self, step):
        """The pages of a step's ranks, of all layers' pages; zeros past the adapter's last."""
        return [self._page(step * STEP_PAGES + i) for i in range(STEP_PAGES)]

    def _page(self, nth):
        found = jnp.int32(0)
        for i, pool in enumerate(self.pools):
            page = pool.page_SW[self.slot, jnp.minimum(nth, pool.page_SW.shape[1] - 1)]
            page = jnp.where(nth < self.pages, page, 0) + self.layer * pool.layer_pages
            found = jnp.where(self.owner == i, page, found)
        return found

    def load_a(self, pages, rows_d, a_rd, barrier) -> None:
        """Starts to load pages of A, of some columns: an arrival a page."""
        for i, pool in enumerate(self.pools):
            load = functools.partial(_load, pool.a_RD, pages, rows_d, a_rd, barrier)
            pl.when(self.owner == i)(load)

    def load_b(self, pages, b_re, barrier) -> None:
        """Starts to load pages of B, of the strip's columns: an arrival a page."""
        for i, pool in enumerate(self.pools):
            columns_e = _block(self.block, self.block_e)
            load = functools.partial(_load, pool.b_RE, pages, columns_e, b_re, barrier)
            pl.when(self.owner == i)(load)


def _load(factor, pages, columns, into, barrier) -> None:
    for i, page in enumerate(pages):
        rows = factor.at[_block(page, PAGE_RANKS), columns]
        plgpu.copy_gmem_to_smem(rows, into.at[pl.ds(i * PAGE_RANKS, PAGE_RANKS)], barrier)


def _block(nth, size: int):
    return pl.ds(pl.multiple_of(nth * size, size), size)


def _body(
    layer,
    slot,
    base_DE,
    pools,
    out_DE,
    *,
    first_blocks,
    blocks: int,
    w_xde,
    loaded_x,
    a_xrd,
    b_re,
    loaded_b,
    more,
):
    block_e = b_re.shape[1]
    block, first_d = jax.lax.axis_index("columns"), jax.lax.axis_index("rows") * blocks
    strip = _Strip(layer[0], slot[0], pools, block, first_blocks=first_blocks, block_e=block_e)

    def at(nth):
        return _block(first_d + nth, BLOCK_D), _block(block, block_e)

    def load(nth):
        x = jax.lax.rem(nth, jnp.int32(PLACES))
        plgpu.copy_gmem_to_smem(base_DE.at[*at(nth)], w_xde.at[x], loaded_x.at[x])
        strip.load_a(strip.first_pages, at(nth)[0], a_xrd.at[x], loaded_x.at[x])

    def merge(nth, carry):
        x = jax.lax.rem(nth, jnp.int32(PLACES))
        plgpu.barrier_wait(loaded_x.at[x])
        update_de = _product(strip, at(nth)[0], a_xrd.at[x], b_re, more)
        w_de = w_xde[x].astype(jnp.float32) + strip.scale * update_de
        w_xde[x] = w_de.astype(w_xde.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(w_xde.at[x], out_DE.at[*at(nth)])
        # The block before has left its place.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        ahead = nth + PLACES - 1
        pl.when(ahead < blocks)(lambda: load(ahead))
        return carry

    for nth in range(min(PLACES - 1, blocks)):
        load(jnp.int32(nth))
    strip.load_b(strip.first_pages, b_re, loaded_b)
    plgpu.barrier_wait(loaded_b)
    jax.lax.fori_loop(jnp.int32(0), jnp.int32(blocks), merge, None)
    plgpu.wait_smem_to_gmem(0)


def _product(strip, rows_d, a_rd, b_re, more):
    """`A^T @ B` of all of an adapter's ranks, of which the first are loaded."""
    more_a_rd, more_b_re, loaded_more = more

    def sum_products(sum_de):
        def add_more(step, carry):
            pages = strip.pages_of(step)
            strip.load_a(pages, rows_d, more_a_rd, loaded_more)
            strip.load_b(pages, more_b_re, loaded_more)
            plgpu.barrier_wait(loaded_more)
            plgpu.wgmma(sum_de, more_a_rd.transpose((1, 0)), more_b_re)
            plgpu.wgmma_wait(0)
            plgpu.commit_smem()  # every warp is done with what the next step loads over
            return carry

        plgpu.wgmma(sum_de, a_rd.transpose((1, 0)), b_re)
        plgpu.wgmma_wait(0)
        jax.lax.fori_loop(jnp.int32(1), pl.cdiv(strip.pages, STEP_PAGES), add_more, None)
        return sum_de[...]

    return pl.run_scoped(sum_products, plgpu.ACC((BLOCK_D, b_re.shape[1]), jnp.float32))


# `merged_DE` is read by nothing, and kept because the result takes its memory.
@functools.partial(
    jax.jit, static_argnames="columns", donate_argnames="merged_DE", keep_unused=True
)
def lora_merge(merged_DE, base_DE, pools, layer, slot, *, columns):
    """See `api.lora_merge`, which has checked the shapes.

    Raises:
      NotImplementedError: there is a `refusal`.
    """
    if (why := refusal(base_DE, pools, columns)) is not None:
        raise NotImplementedError(f"'mosaic' does not merge these, {why}; use 'triton' or 'xla'")
    (D, E), dtype = base_DE.shape, base_DE.dtype
    block_e = math.gcd(_common_divisor(E, pools, columns), WIDEST_BLOCK_E)
    blocks = math.gcd(D // BLOCK_D, BLOCKS)

    def shared(*shape: int):
        # As the matmul unit reads it. The type checker takes the two for abstract.
        tiled = plgpu.TilingTransform((8, 64))  # pyright: ignore[reportAbstractUsage]
        swizzled = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
        return plgpu.SMEM(shape, dtype, transforms=(tiled, swizzled))

    run = plgpu.kernel(
        functools.partial(_body, first_blocks=[c // block_e for c in columns], blocks=blocks),
        out_type=jax.ShapeDtypeStruct((D, E), dtype),
        grid=(D // BLOCK_D // blocks, E // block_e),
        grid_names=("rows", "columns"),
        scratch_types=dict(
            w_xde=shared(PLACES, BLOCK_D, block_e),
            a_xrd=shared(PLACES, STEP_RANKS, BLOCK_D),
            loaded_x=plgpu.Barrier(num_arrivals=1 + STEP_PAGES, num_barriers=PLACES),
            b_re=shared(STEP_RANKS, block_e),
            loaded_b=plgpu.Barrier(num_arrivals=STEP_PAGES),
            more=(
                shared(STEP_RANKS, BLOCK_D),
                shared(STEP_RANKS, block_e),
                plgpu.Barrier(num_arrivals=2 * STEP_PAGES),
            ),
        ),
    )
    # Reshaped, as a launch that stacks them would cost as much as a linear's first blocks.
    return run(jnp.reshape(layer, 1), jnp.reshape(slot, 1), base_DE, pools)
