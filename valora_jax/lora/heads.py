"""Heads that adapters bring: whole replacements of the `lm_head`, and task heads.

A replaced head is large, so there are few, each a page of the site `REPLACED_HEADS`; task heads are
small, so every adapter slot has room for one. S sampled rows, D model width, V vocabulary rows,
P adapter slots, C classes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from valora_jax.lora.adapter import Adapter, AdapterTarget
from valora_jax.lora.blocks import Array
from valora_jax.lora.residency import REPLACED_HEADS, Placement


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReplacedHeads:
    """Attributes:
    heads_DV: an array `[D, V]` each: page p of `REPLACED_HEADS` is `heads_DV[p - 1]`. As one
      stacked array, a CPU copied each head that it multiplied, and took three times as long.
    page_P: `[P]` int32 page of each adapter slot, 0 where it keeps the base's head.
    """

    heads_DV: Sequence[jax.Array]
    page_P: jax.Array


class HeadPool:
    """Room for a number of replaced heads. A write replaces `heads`, as in `DevicePool`."""

    def __init__(self, target: AdapterTarget, *, heads: int, slots: int, dtype: DTypeLike):
        shape_DV = (target.width, target.vocab_rows)
        self._dtype = jnp.dtype(dtype)
        self.heads = ReplacedHeads(
            heads_DV=tuple(jnp.zeros(shape_DV, dtype) for _ in range(heads)),
            page_P=jnp.zeros(slots, jnp.int32),
        )

    def blocks(self, adapter: Adapter) -> np.ndarray | None:
        """The adapter's replaced head `[V, D]` as `write` takes it; safe in any thread."""
        head_VD = adapter.replaced_head_VD
        return None if head_VD is None else head_VD.astype(self._dtype)

    def write(self, head_VD: Array | None, placement: Placement) -> None:
        """Writes what `blocks` made to its place; does not wait."""
        page = 0
        if head_VD is not None:
            (page,) = placement.pages[REPLACED_HEADS]
            self._write(head_VD, page - 1)
        page_P = _write_page(self.heads.page_P, np.int32(page), np.int32(placement.slot))
        self.heads = dataclasses.replace(self.heads, page_P=page_P)

    def warm_up(self) -> None:
        """Compiles the write by writing zeros. Only for an empty pool."""
        page_P = _write_page(self.heads.page_P, np.int32(0), np.int32(0))
        self.heads = dataclasses.replace(self.heads, page_P=page_P)
        if self.heads.heads_DV:
            shape_VD = self.heads.heads_DV[0].shape[::-1]
            self._write(jax.device_put(np.zeros(shape_VD, self._dtype)), 0)

    def _write(self, head_VD: Array, index: int) -> None:
        heads_DV = list(self.heads.heads_DV)
        heads_DV[index] = _write_head(heads_DV[index], head_VD)
        self.heads = dataclasses.replace(self.heads, heads_DV=tuple(heads_DV))


def head_bytes(target: AdapterTarget, *, heads: int, slots: int, dtype: DTypeLike) -> int:
    """Bytes that a `HeadPool` of these arguments takes."""
    return heads * target.width * target.vocab_rows * jnp.dtype(dtype).itemsize + 4 * slots


def replaced_logits(
    logits_SV: jax.Array, hidden_SD: jax.Array, heads: ReplacedHeads, *, adapter_S: jax.Array
) -> jax.Array:
    """Puts the logits of replaced heads in place of the base's. LoRA on the head comes after.

    Costs one product a replaced head in use, and nothing where there is none.

    Args:
      logits_SV: of the base.
      hidden_SD: input of the head.
      heads: of the `HeadPool`.
      adapter_S: `[S]` int32 adapter slot of each row, -1 for none.
    """
    page_S = jnp.where(adapter_S >= 0, heads.page_P[adapter_S], 0)
    for page, head_DV in enumerate(heads.heads_DV, start=1):

        def replace_rows(logits_SV, head_DV=head_DV, mine_S=page_S == page):
            head_DV = head_DV.astype(hidden_SD.dtype)
            new_SV = jnp.dot(hidden_SD, head_DV, preferred_element_type=jnp.float32)
            return jnp.where(mine_S[:, None], new_SV.astype(logits_SV.dtype), logits_SV)

        logits_SV = jax.lax.cond((page_S == page).any(), replace_rows, lambda x: x, logits_SV)
    return logits_SV


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TaskHeads:
    """The task head of every slot, in float32, filled up with zeros: `[P, C, D]` and `[P, C]`."""

    weight_PCD: jax.Array
    bias_PC: jax.Array


class TaskHeadBlocks(NamedTuple):
    """One task head, filled up with zeros to the classes that there is room for."""

    weight_CD: np.ndarray
    bias_C: np.ndarray


class TaskHeadPool:
    """Room for a task head in every adapter slot. A write replaces `heads`."""

    def __init__(self, target: AdapterTarget, *, slots: int, max_classes: int):
        self._shape_CD = (max_classes, target.width)
        self.heads = TaskHeads(
            weight_PCD=jnp.zeros((slots, max_classes, target.width), jnp.float32),
            bias_PC=jnp.zeros((slots, max_classes), jnp.float32),
        )

    def refusals(self, adapter: Adapter) -> list[str]:
        """Why an adapter's task head does not fit; empty if it does or there is none."""
        max_classes, _ = self._shape_CD
        head = adapter.task_head
        if head is None or (classes := head.weight_CD.shape[0]) <= max_classes:
            return []
        return [
            f"{head.module}: a task head of {classes} classes, the device has room for "
            f"{max_classes}; raise EngineConfig.max_classes"
        ]

    def blocks(self, adapter: Adapter) -> TaskHeadBlocks | None:
        """The adapter's task head, if it has one, as `write` takes it; safe in any thread."""
        if (head := adapter.task_head) is None:
            return None
        return self._filled_up(head.weight_CD, head.bias_C)

    def write(self, head: TaskHeadBlocks | None, placement: Placement) -> None:
        """Writes what `blocks` made to its slot; does not wait."""
        if head is not None:
            self.heads = _write_task_head(self.heads, head, np.int32(placement.slot))

    def warm_up(self) -> None:
        """Compiles the write by writing zeros. Only for an empty pool."""
        nothing = self._filled_up(np.zeros((0, self._shape_CD[1])), None)
        self.heads = _write_task_head(self.heads, jax.device_put(nothing), np.int32(0))

    def _filled_up(self, weight_CD: np.ndarray, bias_C: np.ndarray | None) -> TaskHeadBlocks:
        head = TaskHeadBlocks(
            np.zeros(self._shape_CD, np.float32), np.zeros(self._shape_CD[0], np.float32)
        )
        head.weight_CD[: len(weight_CD)] = weight_CD
        if bias_C is not None:
            head.bias_C[: len(bias_C)] = bias_C
        return head


def class_logits(hidden_SD: jax.Array, heads: TaskHeads, adapter_S: jax.Array) -> jax.Array:
    """Applies each row's task head.

    Args:
      hidden_SD: after the final norm.
      heads: of the `TaskHeadPool`.
      adapter_S: `[S]` int32 adapter slot of each row; rows of -1 get zeros.

    Returns:
      `[S, C]` float32; beyond an adapter's own classes, zeros.
    """
    # Full float32: a GPU would round the factors to 10 bits otherwise.
    logits_SC = jnp.einsum(
        "SD,SCD->SC",
        hidden_SD.astype(jnp.float32),
        heads.weight_PCD[adapter_S],
        precision=jax.lax.Precision.HIGHEST,
    )
    logits_SC += heads.bias_PC[adapter_S]
    return jnp.where((adapter_S >= 0)[:, None], logits_SC, 0)


# keep_unused: the old head is donated for its memory alone.
@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _write_head(_old_DV: jax.Array, head_VD: jax.Array) -> jax.Array:
    return head_VD.T


@functools.partial(jax.jit, donate_argnums=0)
def _write_page(page_P: jax.Array, page: jax.Array, slot: jax.Array) -> jax.Array:
    return page_P.at[slot].set(page)


@functools.partial(jax.jit, donate_argnums=0)
def _write_task_head(heads: TaskHeads, head: TaskHeadBlocks, slot: jax.Array) -> TaskHeads:
    write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=slot, axis=0)
    return TaskHeads(
        weight_PCD=write(heads.weight_PCD, head.weight_CD),
        bias_PC=write(heads.bias_PC, head.bias_C),
    )
