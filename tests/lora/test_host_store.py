import dataclasses
import threading

import numpy as np
import pytest

from tests.lora.llava_tiny import GOLDENS, TARGET
from valora_jax.errors import AdapterError, AdapterNotFoundError, OutOfCapacityError
from valora_jax.lora.adapter import Adapter, LoraPair
from valora_jax.lora.host_store import AdapterRef, HostStore, NewAdapter
from valora_jax.lora.read import read_adapter

BYTES = 8 * 4 * 2 * 4  # of one adapter below


def make(name: str, seed: int = 0) -> Adapter:
    a_RK, b_RN = np.random.default_rng(seed).standard_normal((2, 8, 4), np.float32)
    pair = LoraPair(a_RK=a_RK, b_RN=b_RN, scale=2.0)
    return Adapter(name=name, source="a test", pairs={"decoder.q": {0: pair}})


class Folders:
    """Adapters by path, and how often each was read."""

    def __init__(self, **adapters: Adapter):
        self.adapters, self.reads = adapters, []

    def reread(self, path, name: str) -> Adapter:
        self.reads.append(path)
        if path not in self.adapters:
            raise AdapterError(name, [f"{path}: no such folder"])
        return dataclasses.replace(self.adapters[path], name=name)


def make_store(folders: Folders | None = None, *, adapters: float = 10) -> HostStore:
    return HostStore(max_bytes=int(adapters * BYTES), reread=(folders or Folders()).reread)


def names(store: HostStore) -> list[str]:
    return [info.ref.name for info in store.list_adapters()]


def in_memory(store: HostStore) -> set[str]:
    return {info.ref.name for info in store.list_adapters() if info.in_memory}


def fill(folders: Folders, *, adapters: float) -> tuple[HostStore, dict[str, AdapterRef]]:
    store = make_store(folders, adapters=adapters)
    return store, {
        name: store.register(NewAdapter.of_folder(name, dataclasses.replace(adapter, name=name)))
        for name, adapter in folders.adapters.items()
    }


def test_a_name_means_the_version_loaded_last():
    store = make_store()
    first = store.register(NewAdapter(adapter=make("cars")))
    assert store.resolve("cars") == first
    second = store.register(NewAdapter(adapter=make("cars", seed=1)))
    assert store.resolve("cars") == second != first


def test_a_replaced_version_goes_when_its_last_request_does():
    store = make_store()
    old = make("cars")
    first = store.register(NewAdapter(adapter=old))
    store.hold(first)
    store.hold(first)
    second = store.register(NewAdapter(adapter=make("cars", seed=1)))
    store.release(first)
    assert store.get(first) is old
    assert [(i.ref, i.current, i.users) for i in store.list_adapters()] == [
        (first, False, 1),
        (second, True, 0),
    ]
    store.release(first)
    with pytest.raises(AdapterNotFoundError, match=f"no adapter 'cars version {first.version}'"):
        store.get(first)


def test_an_adapter_unloaded_in_use_finishes_then_goes():
    store = make_store()
    ref = store.register(NewAdapter(adapter=make("cars")))
    store.hold(ref)
    assert store.unregister("cars") == ref
    with pytest.raises(AdapterNotFoundError, match="no adapter 'cars'; loaded: none"):
        store.resolve("cars")
    assert store.get(ref).name == "cars"
    store.release(ref)
    assert names(store) == []


def test_a_name_loaded_again_after_it_was_unloaded_is_another_version():
    store = make_store()
    first = store.register(NewAdapter(adapter=make("cars")))
    store.unregister("cars")
    assert store.register(NewAdapter(adapter=make("cars"))) != first


def test_unknown_names_are_refused_with_the_known_ones():
    store = make_store()
    for name in ("planes", "cars"):
        store.register(NewAdapter(adapter=make(name)))
    for use in (store.resolve, store.unregister):
        with pytest.raises(AdapterNotFoundError, match="no adapter 'ships'; loaded: cars, planes"):
            use("ships")


def test_more_releases_than_holds_are_refused():
    store = make_store()
    ref = store.register(NewAdapter(adapter=make("cars")))
    with pytest.raises(ValueError, match="nobody holds it"):
        store.release(ref)


def test_the_least_recently_used_is_dropped_and_read_again():
    folders = Folders(a=make("a"), b=make("b", 1), c=make("c", 2))
    store, refs = fill(folders, adapters=2)
    assert in_memory(store) == {"b", "c"}
    store.get(refs["b"])
    again = store.get(refs["a"])
    assert folders.reads == ["a"]
    assert in_memory(store) == {"a", "b"}
    assert again.fingerprint() == folders.adapters["a"].fingerprint()
    assert store.get(refs["a"]) is again


def test_adapters_in_use_are_dropped_last():
    folders = Folders(a=make("a"), b=make("b", 1), c=make("c", 2))
    store, refs = fill(folders, adapters=3)
    store.hold(refs["a"])
    store.register(NewAdapter.of_folder("d", make("d", 3)))
    assert in_memory(store) == {"a", "c", "d"}


def test_a_superseded_version_in_use_is_dropped_after_all_others():
    folders = Folders(a=make("a"), b=make("b", 1))
    store, refs = fill(folders, adapters=2)
    for ref in refs.values():
        store.hold(ref)
    folders.adapters["a"] = make("a", 2)
    newer = store.register(NewAdapter.of_folder("a", folders.adapters["a"]))
    store.hold(newer)
    store.get(newer)
    assert [i.in_memory for i in store.list_adapters()] == [True, True, False]  # a, a, b


def test_a_folder_that_changed_is_not_served_as_the_old_version():
    folders = Folders(a=make("a"))
    store, refs = fill(folders, adapters=0)
    folders.adapters["a"] = make("a", seed=1)
    with pytest.raises(ValueError, match="a has changed since it was loaded; load it again"):
        store.get(refs["a"])
    del folders.adapters["a"]
    with pytest.raises(AdapterError, match="no such folder"):
        store.get(refs["a"])


def test_adapters_without_a_folder_stay_until_they_alone_exceed_the_bound():
    store = make_store(adapters=2)
    ref = store.register(NewAdapter(adapter=make("sum")))
    for i, name in enumerate("abc"):
        store.register(NewAdapter.of_folder(name, make(name, i)))
    assert "sum" in in_memory(store)
    assert store.get(ref).name == "sum"
    store.register(NewAdapter(adapter=make("sum2")))
    with pytest.raises(OutOfCapacityError, match=rf"2 others.*{3 * BYTES} bytes.* {2 * BYTES}; "):
        store.register(NewAdapter(adapter=make("sum3")))
    assert "sum3" not in names(store)
    store.register(NewAdapter(adapter=make("sum2", seed=1)))  # in place of the one before


def test_an_adapter_that_needs_the_base_is_refused():
    adapter = dataclasses.replace(make("a"), base_head_copy_VD=np.zeros((4, 4), np.float32))
    with pytest.raises(ValueError, match="call with_base first"):
        make_store().register(NewAdapter(adapter=adapter))


def test_the_list_says_what_is_bound():
    store = make_store(adapters=1e9)
    path = GOLDENS / "a06_qv_r64"
    store.register(NewAdapter.of_folder(path, read_adapter(path, name="cars", target=TARGET)))
    (info,) = store.list_adapters()
    assert info.bound == "decoder q, v of layers 0, 2, rank 64"
    assert str(path) in info.source
    assert info.size_bytes == 2 * 2 * 64 * 256 * 2


def test_versions_and_their_users_are_looked_up_without_a_list():
    store = make_store()
    ref = store.register(NewAdapter(adapter=make("cars")))
    store.hold(ref)
    assert (ref in store, store.users(ref)) == (True, 1)
    store.unregister("cars")
    store.release(ref)
    assert (ref in store, store.users(ref)) == (False, 0)


def test_the_list_marks_those_that_are_pinned():
    store = make_store()
    pinned, _ = (store.register(NewAdapter(adapter=make(name))) for name in ("cars", "planes"))
    assert [info.pinned for info in store.list_adapters(pinned=[pinned])] == [True, False]


def test_reading_a_folder_again_does_not_hold_others_up():
    folders, reading, go_on = Folders(a=make("a")), threading.Event(), threading.Event()

    def reread(path, name):
        reading.set()
        assert go_on.wait(10)
        return folders.reread(path, name)

    store = HostStore(max_bytes=0, reread=reread)
    ref = store.register(NewAdapter.of_folder("a", make("a")))
    reader = threading.Thread(target=store.get, args=(ref,))
    reader.start()
    assert reading.wait(10)
    assert store.resolve("a") == ref
    go_on.set()
    reader.join()
