import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.lora.llava_tiny import GOLDENS, TARGET
from valora_jax.lora.adapter import Adapter, TaskHead
from valora_jax.lora.blocks import pages_needed
from valora_jax.lora.heads import (
    HeadPool,
    TaskHeadPool,
    class_logits,
    head_bytes,
    replaced_logits,
)
from valora_jax.lora.host_store import AdapterRef
from valora_jax.lora.read import read_adapter
from valora_jax.lora.residency import REPLACED_HEADS, Placement, Residency

D, V, SLOTS = TARGET.width, TARGET.vocab_rows, 3
PAGES = {REPLACED_HEADS: 3, "decoder.q": 4, "decoder.v": 4}
# Sums of 128 products, in another order and in float64.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def golden(name: str) -> Adapter:
    return read_adapter(GOLDENS / name, name=name, target=TARGET)


def with_head(name: str, seed: int) -> Adapter:
    head_VD = np.random.default_rng(seed).standard_normal((V, D), np.float32)
    return Adapter(name=name, source="a test", pairs={}, replaced_head_VD=head_VD)


def task_adapter(classes: int, *, bias: bool) -> Adapter:
    rng = np.random.default_rng(classes)
    head = TaskHead(
        module="score",
        weight_CD=rng.standard_normal((classes, D), np.float32),
        bias_C=rng.standard_normal(classes, np.float32) if bias else None,
    )
    return Adapter(name=f"task{classes}", source="a test", pairs={}, task_head=head)


def at(slot: int) -> Placement:
    return Placement(slot=slot, pages={})


def hidden(rows: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((rows, D), np.float32)


@jax.jit
def step(logits_SV, hidden_SD, heads, adapter_S):
    return replaced_logits(logits_SV, hidden_SD, heads, adapter_S=adapter_S)


def head_pool(*, heads: int, dtype=jnp.float32) -> HeadPool:
    return HeadPool(TARGET, heads=heads, slots=SLOTS, dtype=dtype)


def write(pool: HeadPool | TaskHeadPool, adapter: Adapter, placement: Placement) -> None:
    pool.write(jax.device_put(pool.blocks(adapter)), placement)


def load(pool: HeadPool, residency: Residency, adapter: Adapter) -> int:
    """Returns the slot."""
    ref = AdapterRef(name=adapter.name, version=1)
    placement = residency.place(ref, pages_needed(adapter))
    assert placement is not None
    write(pool, adapter, placement)
    return residency.acquire(ref)


def test_rows_with_a_replaced_head_get_its_logits_and_others_the_base_s():
    pool, residency = head_pool(heads=2), Residency(PAGES, slots=SLOTS)
    adapters = [with_head("one", 5), golden("a09_lm_head_saved"), golden("a21_binfile")]
    slots = [load(pool, residency, adapter) for adapter in adapters]
    rows = [1, None, 0, 2, 1]
    adapter_S = np.array([-1 if i is None else slots[i] for i in rows], np.int32)
    base_SV, hidden_SD = np.ones((5, V), np.float32), hidden(5)
    got_SV = step(base_SV, hidden_SD, pool.heads, adapter_S)
    for row, i in enumerate(rows):
        if i in (None, 2):
            want_V = base_SV[row]
        else:
            want_V = np.float64(adapters[i].replaced_head_VD) @ np.float64(hidden_SD[row])
        np.testing.assert_allclose(got_SV[row], want_V, **FLOAT32)


def test_where_no_row_has_a_replaced_head_the_base_is_untouched():
    pool, residency = head_pool(heads=2), Residency(PAGES, slots=SLOTS)
    load(pool, residency, with_head("one", 5))
    base_SV, adapter_S = np.ones((2, V), np.float32), np.array([-1, -1], np.int32)
    got_SV = step(base_SV, hidden(2), pool.heads, adapter_S)
    np.testing.assert_array_equal(got_SV, base_SV)
    none = head_pool(heads=0).heads
    np.testing.assert_array_equal(step(base_SV, hidden(2), none, adapter_S), base_SV)


def test_a_slot_keeps_no_head_of_its_last_adapter():
    pool = head_pool(heads=1)
    write(pool, with_head("one", 5), Placement(slot=1, pages={REPLACED_HEADS: (1,)}))
    write(pool, golden("a21_binfile"), at(1))
    base_SV, adapter_S = np.ones((1, V), np.float32), np.array([1], np.int32)
    np.testing.assert_array_equal(step(base_SV, hidden(1), pool.heads, adapter_S), base_SV)


def test_more_replaced_heads_than_fit_take_turns():
    pool, residency = head_pool(heads=2), Residency(PAGES, slots=SLOTS)
    first, second, third = (with_head(f"h{i}", i) for i in range(3))
    for adapter in (first, second):
        load(pool, residency, adapter)
    assert residency.place(AdapterRef(name="h2", version=1), pages_needed(third)) is None
    residency.release(AdapterRef(name="h0", version=1))
    slot = load(pool, residency, third)
    adapter_S, hidden_SD = np.array([slot], np.int32), hidden(1)
    got_SV = step(np.zeros((1, V), np.float32), hidden_SD, pool.heads, adapter_S)
    want_SV = np.float64(hidden_SD) @ np.float64(third.replaced_head_VD).T
    np.testing.assert_allclose(got_SV, want_SV, **FLOAT32)


def test_writes_compile_nothing_after_warm_up_and_happen_in_place():
    heads = head_pool(heads=2, dtype=jnp.bfloat16)
    tasks = TaskHeadPool(TARGET, slots=SLOTS, max_classes=8)
    heads.warm_up()
    tasks.warm_up()
    jax.block_until_ready((heads.heads, tasks.heads))
    assert not any(leaf.any() for leaf in jax.tree.leaves((heads.heads, tasks.heads)))

    def pointers():
        return [a.unsafe_buffer_pointer() for a in jax.tree.leaves((heads.heads, tasks.heads))]

    before = pointers()
    jax.config.update("jax_no_tracing", True)
    try:
        for page, adapter in enumerate([golden("a09_lm_head_saved"), with_head("h", 3)], start=1):
            write(heads, adapter, Placement(slot=0, pages={REPLACED_HEADS: (page,)}))
        for slot, adapter in enumerate([golden("a10_new_head"), task_adapter(3, bias=True)]):
            write(tasks, adapter, at(slot))
    finally:
        jax.config.update("jax_no_tracing", False)
    assert pointers() == before


def test_no_room_for_heads_takes_no_memory():
    pool = head_pool(heads=0)
    pool.warm_up()
    write(pool, golden("a10_new_head"), at(0))  # brings no replaced head
    assert pool.heads.heads_DV == ()


def test_bytes_of_heads():
    pool = head_pool(heads=2, dtype=jnp.bfloat16)
    want = sum(leaf.nbytes for leaf in jax.tree.leaves(pool.heads))
    assert head_bytes(TARGET, heads=2, slots=SLOTS, dtype=jnp.bfloat16) == want


def test_each_row_is_classified_by_its_own_head():
    tasks = TaskHeadPool(TARGET, slots=SLOTS, max_classes=8)
    adapters = {0: golden("a10_new_head"), 2: task_adapter(3, bias=True)}
    for slot, adapter in adapters.items():
        write(tasks, adapter, at(slot))
    rows, hidden_SD = np.array([2, -1, 0, 2], np.int32), hidden(4)
    got_SC = jax.jit(class_logits)(hidden_SD, tasks.heads, rows)
    want_SC = np.zeros((4, 8))
    for row, slot in enumerate(rows):
        if slot >= 0:
            head = adapters[int(slot)].task_head
            want_C = np.float64(head.weight_CD) @ np.float64(hidden_SD[row])
            want_SC[row, : len(want_C)] = want_C + (0 if head.bias_C is None else head.bias_C)
    np.testing.assert_allclose(got_SC, want_SC, **FLOAT32)


def test_a_slot_keeps_nothing_of_a_larger_head_before():
    tasks = TaskHeadPool(TARGET, slots=1, max_classes=8)
    for adapter in (task_adapter(7, bias=True), task_adapter(2, bias=False)):
        write(tasks, adapter, at(0))
    got_SC = class_logits(jnp.asarray(hidden(1)), tasks.heads, jnp.array([0]))
    assert not got_SC[:, 2:].any()


@pytest.mark.parametrize(("max_classes", "refused"), [(0, True), (6, True), (7, False)])
def test_a_task_head_that_is_too_large_is_refused(max_classes, refused):
    tasks = TaskHeadPool(TARGET, slots=SLOTS, max_classes=max_classes)
    tasks.warm_up()
    message = (
        f"score: a task head of 7 classes, the device has room for {max_classes}; "
        "raise EngineConfig.max_classes"
    )
    assert tasks.refusals(golden("a10_new_head")) == ([message] if refused else [])
    assert tasks.refusals(golden("a21_binfile")) == []


def test_heads_are_rounded_once_to_the_type_of_the_pool():
    pool, adapter = head_pool(heads=1, dtype=jnp.bfloat16), golden("a09_lm_head_saved")
    adapter = dataclasses.replace(adapter, replaced_head_VD=np.float32(adapter.replaced_head_VD))
    write(pool, adapter, Placement(slot=0, pages={REPLACED_HEADS: (1,)}))
    want_VD = adapter.replaced_head_VD.astype(jnp.bfloat16)
    np.testing.assert_array_equal(pool.heads.heads_DV[0], want_VD.T)
