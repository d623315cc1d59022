import shutil

import jax
import numpy as np
import pytest

from tests.engine.bare_adapters import (
    TARGET,
    VISION,
    WIDE,
    A,
    B,
    acquired,
    bare_adapters,
    loaded,
    request_of,
)
from tests.engine.engines import ADAPTERS, CONFIG
from valora_jax.engine.adapters import EngineAdapters
from valora_jax.engine.events import AdapterEvicted, AdapterUnloaded, AdapterUploaded, Events
from valora_jax.errors import AdapterError, AdapterNotFoundError
from valora_jax.lora.device import DeviceAdapters
from valora_jax.lora.host_store import NewAdapter
from valora_jax.lora.read import read_adapter


@pytest.fixture
def adapters_of():
    with bare_adapters() as make:
        yield make


def reads_of(adapters: EngineAdapters, monkeypatch) -> list[str]:
    """The names of the folders that are read again from here on."""
    reads, reread = [], adapters._store._reread

    def counted(path, name):
        reads.append(name)
        return reread(path, name)

    monkeypatch.setattr(adapters._store, "_reread", counted)
    return reads


def test_a_request_holds_a_slot_and_the_base_model_none(adapters_of):
    adapters = adapters_of(max_adapters=1)
    loaded(adapters, A)
    with_a, base = request_of(adapters.hold(A)), request_of(None)
    assert acquired(adapters, with_a)
    assert adapters.acquire(base)
    assert (adapters.slot(with_a), adapters.slot(base), adapters.residency.in_use) == (0, -1, 1)
    adapters.release(with_a)
    adapters.release(base)
    assert adapters.residency.in_use == 0


def test_more_adapters_than_slots_wait_for_one(adapters_of):
    adapters = adapters_of(max_adapters=1)
    for name in (A, B):
        loaded(adapters, name)
    first, second = (request_of(adapters.hold(name)) for name in (A, B))
    assert acquired(adapters, first)
    assert not acquired(adapters, second)
    adapters.release(first)
    assert acquired(adapters, second)


def test_who_comes_and_goes_is_told(adapters_of):
    events, heard = Events(), []
    events.listen(heard.append)
    adapters = adapters_of(max_adapters=1, events=events)
    a, b = (loaded(adapters, name).ref for name in (A, B))
    users = [request_of(adapters.hold(name)) for name in (A, B)]
    for user in users:
        assert acquired(adapters, user)
        adapters.release(user)
    assert heard == [
        AdapterUploaded(adapter=a, slot=0),
        AdapterEvicted(adapter=a),
        AdapterUploaded(adapter=b, slot=0),
    ]
    heard.clear()
    loaded(adapters, B)  # a new version
    adapters.unload(A)
    assert heard == []
    for user in users:
        adapters.let_go(user.adapter)
    assert heard == [AdapterUnloaded(adapter=a), AdapterUnloaded(adapter=b)]


def test_who_waits_for_a_slot_reads_no_folder_again(adapters_of, monkeypatch):
    adapters = adapters_of(max_adapters=1, host_adapter_bytes=0)
    for name in (A, B):
        loaded(adapters, name)
    assert [info.in_memory for info in adapters.infos()] == [False, False]
    reads = reads_of(adapters, monkeypatch)
    first, second = (request_of(adapters.hold(name)) for name in (A, B))
    assert acquired(adapters, first)
    for _ in range(3):
        assert not acquired(adapters, second)
    adapters.release(first)
    assert acquired(adapters, second)
    assert reads == [A, B]


def test_a_folder_that_changed_fails_its_request_and_holds_nothing(adapters_of, tmp_path):
    adapters = adapters_of(max_adapters=1, host_adapter_bytes=0)
    shutil.copytree(ADAPTERS / A, tmp_path / "a")
    loaded(adapters, "changed", tmp_path / "a")
    loaded(adapters, B)
    shutil.copytree(ADAPTERS / B, tmp_path / "a", dirs_exist_ok=True)
    broken, other = request_of(adapters.hold("changed")), request_of(adapters.hold(B))
    assert not acquired(adapters, broken)
    ((failed, error),) = adapters.take_failures()
    assert failed is broken
    assert "has changed since it was loaded; load it again" in str(error)
    assert (adapters.take_failures(), adapters.residency.in_use) == ([], 0)
    assert acquired(adapters, other)
    adapters.release(other)
    shutil.copytree(ADAPTERS / A, tmp_path / "a", dirs_exist_ok=True)
    assert acquired(adapters, broken)  # nothing of the failure stays on the device


def test_a_reloaded_name_is_a_new_version_and_the_old_one_goes_with_its_last_user(adapters_of):
    adapters = adapters_of()
    loaded(adapters, "name", ADAPTERS / A)
    old = adapters.hold("name")
    user = request_of(old)
    assert acquired(adapters, user)
    loaded(adapters, "name", ADAPTERS / VISION)
    new = adapters.hold("name")
    assert new != old
    assert [(info.ref, info.current) for info in adapters.infos()] == [(old, False), (new, True)]
    assert (adapters.changes_vision(old), adapters.changes_vision(new)) == (False, True)
    adapters.release(user)
    adapters.let_go(old)
    assert [info.ref for info in adapters.infos()] == [new]
    assert old not in adapters.residency


def test_an_unloaded_adapter_finishes_and_then_leaves_the_device(adapters_of):
    adapters = adapters_of()
    loaded(adapters, A)
    user = request_of(adapters.hold(A))
    assert acquired(adapters, user)
    adapters.unload(A)
    with pytest.raises(AdapterNotFoundError, match="no adapter 'a01_attn_lm_r8'; loaded: none"):
        adapters.hold(A)
    assert adapters.residency.in_use == 1
    adapters.release(user)
    adapters.let_go(user.adapter)
    assert (adapters.infos(), adapters.residency._residents) == ([], {})


def test_a_version_says_where_it_is_and_what_it_takes(adapters_of):
    adapters = adapters_of(max_adapters=1)
    ref, other = (loaded(adapters, name).ref for name in (A, WIDE))
    assert adapters.pages(other) == {"decoder.q": 4, "decoder.v": 4}
    assert adapters.slot_of(ref) is None
    user = request_of(ref)
    assert acquired(adapters, user)
    adapters.release(user)
    assert (adapters.slot_of(ref), adapters.uploads) == (0, 1)  # unused, but still there
    assert acquired(adapters, request_of(other))
    assert (adapters.slot_of(ref), adapters.slot_of(other), adapters.uploads) == (None, 0, 2)


def test_adapters_need_no_folder(adapters_of):
    adapters = adapters_of()
    adapter = read_adapter(ADAPTERS / A, name="made", target=TARGET)
    info = adapters.register(NewAdapter(adapter=adapter))
    assert adapters.infos() == [info]
    assert acquired(adapters, request_of(adapters.hold("made")))


def test_what_can_never_be_placed_is_refused_with_every_reason(adapters_of):
    adapters = adapters_of(lora_pages=2, max_classes=6, max_replaced_heads=0)
    with pytest.raises(AdapterError, match="needs 4 pages of rank rows, the device has 2") as error:
        loaded(adapters, "wide", ADAPTERS / WIDE)
    assert str(error.value).count("raise EngineConfig.lora_pages") == 2
    with pytest.raises(AdapterError, match=r"7 classes.*raise EngineConfig\.max_classes"):
        loaded(adapters, "classes", ADAPTERS / "a10_new_head")
    assert adapters.infos() == []


def test_bytes_are_those_of_the_arrays(adapters_of):
    adapters = adapters_of()
    zeros = adapters._device.pool._zeros_LrN
    arrays = jax.tree.leaves((adapters.arrays(), adapters.task_heads, zeros))
    want_bytes = DeviceAdapters.size_bytes(CONFIG, TARGET, dtype=np.dtype(np.float32))
    assert sum(array.nbytes for array in arrays) == want_bytes
