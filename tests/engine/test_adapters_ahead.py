"""Adapters that come to the device ahead of their turn, and those that are pinned there."""

import shutil
import threading

import jax
import pytest

from tests.engine.bare_adapters import (
    VISION,
    WIDE,
    A,
    B,
    acquired,
    bare_adapters,
    loaded,
    on_device,
    pinned,
    request_of,
    staged,
)
from tests.engine.engines import ADAPTERS
from valora_jax.engine.adapters import EngineAdapters
from valora_jax.errors import AdapterError, AdapterNotFoundError, OutOfCapacityError


@pytest.fixture
def adapters_of():
    with bare_adapters() as make:
        yield make


@pytest.fixture
def held_back(adapters_of, monkeypatch):
    """Stops adapters' way to the device; the event that it returns lets them go on."""
    go_on = threading.Event()

    def hold_back(adapters: EngineAdapters) -> threading.Event:
        stage = adapters._staging._make

        def later(ref):
            assert go_on.wait(30)
            return stage(ref)

        monkeypatch.setattr(adapters._staging, "_make", later)
        return go_on

    yield hold_back
    go_on.set()


def test_waiting_requests_have_their_adapters_fetched_in_their_order(adapters_of):
    adapters = adapters_of(max_adapters=2)
    for name in (A, B, VISION, WIDE):
        loaded(adapters, name)
    waiting = [request_of(adapters.hold(name)) for name in (B, A, B, VISION, WIDE)]
    for _ in range(2):  # staged, then placed
        adapters.prefetch(waiting)
        staged(adapters)
    assert on_device(adapters) == [A, B]
    for _ in range(2):  # the rest are made ready, but take no place of those before them
        adapters.prefetch(waiting)
        staged(adapters)
    assert (on_device(adapters), adapters.uploads) == ([A, B], 2)
    first, *others = waiting
    assert adapters.acquire(first)
    adapters.prefetch([request_of(None), *others[1:]])  # A is wanted no more
    assert on_device(adapters) == [VISION, B]
    assert adapters.acquire(others[1])
    assert adapters.acquire(others[2])


def test_a_request_far_back_has_nothing_fetched(adapters_of):
    adapters = adapters_of()
    loaded(adapters, A)
    adapters.prefetch([*(request_of(None) for _ in range(50)), request_of(adapters.hold(A))])
    assert not adapters.wait()


def test_who_comes_to_the_front_does_not_wait_for_those_behind(adapters_of):
    adapters = adapters_of(max_adapters=1)
    for name in (A, B, VISION, WIDE):
        loaded(adapters, name)
    running, *waiting, front = (request_of(adapters.hold(name)) for name in (A, B, VISION, WIDE))
    assert acquired(adapters, running)
    adapters.prefetch(waiting)
    staged(adapters)  # both, without a place
    adapters.prefetch([front, *waiting])
    staged(adapters)
    adapters.release(running)
    adapters.prefetch([front, *waiting])
    assert on_device(adapters) == [WIDE]
    assert adapters.acquire(front)


def test_others_go_on_while_an_adapter_comes(adapters_of, held_back):
    adapters = adapters_of()
    for name in (A, B):
        loaded(adapters, name)
    first, second = (request_of(adapters.hold(name)) for name in (A, B))
    assert acquired(adapters, first)
    go_on = held_back(adapters)
    adapters.prefetch([second])
    assert not adapters.acquire(second)
    assert adapters.wait()  # a moment, and in vain
    assert on_device(adapters) == [A]
    adapters.release(first)
    assert adapters.acquire(first)
    go_on.set()
    assert acquired(adapters, second)


def test_one_reading_fails_all_who_asked_for_it_and_none_who_come_later(adapters_of, tmp_path):
    adapters = adapters_of(host_adapter_bytes=0)
    shutil.copytree(ADAPTERS / A, tmp_path / "a")
    loaded(adapters, A, tmp_path / "a")
    requests = [request_of(adapters.hold(A)) for _ in range(3)]
    shutil.move(tmp_path / "a", tmp_path / "b")
    adapters.prefetch(requests)
    staged(adapters)
    assert adapters.take_failures() == []  # it was nobody's turn
    adapters.prefetch(requests)
    assert not any(adapters.acquire(request) for request in requests[:2])
    assert [request for request, _ in adapters.take_failures()] == requests[:2]
    shutil.move(tmp_path / "b", tmp_path / "a")
    assert acquired(adapters, requests[2])


@pytest.mark.parametrize("when", ["under way", "ready"])
def test_an_adapter_that_nobody_waits_for_any_more_does_not_come(adapters_of, held_back, when):
    adapters = adapters_of()
    loaded(adapters, A)
    requests = [request_of(adapters.hold(A)) for _ in range(2)]
    go_on = held_back(adapters)
    adapters.prefetch(requests)
    if when == "ready":
        go_on.set()
        staged(adapters)
    adapters.let_go(requests[0].adapter)
    assert len(adapters._staging._held()) == 1  # the other waits for it
    adapters.let_go(requests[1].adapter)
    go_on.set()
    assert not adapters.wait()
    assert (adapters._staging._held(), adapters.uploads) == ([], 0)


def test_an_adapter_unloaded_on_its_way_comes_for_those_who_hold_it(adapters_of, held_back):
    adapters = adapters_of()
    loaded(adapters, A)
    go_on, user = held_back(adapters), request_of(adapters.hold(A))
    adapters.prefetch([user])
    adapters.unload(A)
    go_on.set()
    assert acquired(adapters, user)
    adapters.release(user)
    adapters.let_go(user.adapter)
    assert adapters.residency._residents == {}
    loaded(adapters, A)
    adapters.prefetch([request_of(adapters.resolve(A))])  # whose engine holds nothing
    adapters.unload(A)
    assert adapters._staging._held() == []


def test_closing_ends_what_is_under_way(adapters_of, held_back):
    adapters = adapters_of()
    for name in (A, B):
        loaded(adapters, name)
    go_on = held_back(adapters)
    adapters.prefetch([request_of(adapters.hold(name)) for name in (A, B)])
    threading.Timer(0, go_on.set).start()
    adapters.close()
    assert not adapters.wait()


def test_a_pinned_adapter_comes_at_once_and_stays(adapters_of):
    adapters = adapters_of(max_adapters=2)
    for name in (A, B, VISION):
        loaded(adapters, name)
    for _ in range(2):
        pinned(adapters, A)
    assert (on_device(adapters), adapters.uploads, adapters.residency.in_use) == ([A], 1, 0)
    assert [info.pinned for info in adapters.infos()] == [True, False, False]
    for name in (B, VISION):
        user = request_of(adapters.hold(name))
        assert acquired(adapters, user)
        adapters.release(user)
    assert on_device(adapters) == [A, VISION]
    adapters.unpin(A)
    adapters.unpin(A)  # already
    assert not any(info.pinned for info in adapters.infos())
    for name in (B, VISION):
        user = request_of(adapters.hold(name))
        assert acquired(adapters, user)
        adapters.release(user)
    assert A not in on_device(adapters)
    with pytest.raises(AdapterNotFoundError, match="nobody"):
        adapters.pin("nobody")


def test_a_pinned_adapter_that_somebody_waits_for_comes_once(adapters_of):
    adapters = adapters_of()
    loaded(adapters, A)
    user = request_of(adapters.hold(A))
    adapters.pin(A)
    for _ in range(3):
        adapters.prefetch([user])
        staged(adapters)
    assert (on_device(adapters), adapters.uploads, adapters._staging._held()) == ([A], 1, [])


def test_a_pinned_adapter_comes_though_its_request_is_gone(adapters_of, held_back):
    adapters = adapters_of()
    loaded(adapters, A)
    go_on, ref = held_back(adapters), adapters.pin(A)
    assert adapters.coming(ref)
    adapters.let_go(adapters.hold(A))
    assert adapters.coming(ref)
    go_on.set()
    pinned(adapters, A)
    assert on_device(adapters) == [A]


def test_one_that_cannot_be_read_again_is_not_pinned(adapters_of, tmp_path):
    adapters = adapters_of(host_adapter_bytes=0)
    shutil.copytree(ADAPTERS / A, tmp_path / "a")
    loaded(adapters, A, tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    with pytest.raises((ValueError, OSError), match="a"):
        pinned(adapters, A)
    assert not adapters.infos()[0].pinned
    shutil.move(tmp_path / "b", tmp_path / "a")
    pinned(adapters, A)
    assert on_device(adapters) == [A]


def test_an_adapter_that_is_there_is_pinned_where_it_is(adapters_of):
    adapters = adapters_of(host_adapter_bytes=0)
    loaded(adapters, A)
    assert acquired(adapters, request_of(adapters.hold(A)))
    adapters.pin(A)
    assert (adapters.uploads, adapters.infos()[0].pinned) == (1, True)


def test_pins_leave_a_place_to_every_other_adapter(adapters_of):
    adapters = adapters_of(max_adapters=2, lora_pages=4)
    for name in (A, B):
        loaded(adapters, name)
    pinned(adapters, A)
    with pytest.raises(OutOfCapacityError, match="2 pinned adapters would take all 2 slots"):
        adapters.pin(B)
    with pytest.raises(AdapterError, match="the device has 3 beside 1 pinned adapters"):
        loaded(adapters, WIDE)
    adapters.unpin(A)
    loaded(adapters, WIDE)
    with pytest.raises(OutOfCapacityError, match=f"'{WIDE} version 3' needs 4 pages .* leave 3"):
        adapters.pin(A)
    assert not any(info.pinned for info in adapters.infos())


def test_a_pinned_adapter_that_finds_no_place_comes_when_there_is_one(adapters_of):
    adapters = adapters_of(max_adapters=2)
    for name in (A, B, VISION):
        loaded(adapters, name)
    running = [request_of(adapters.hold(name)) for name in (A, B)]
    assert all(acquired(adapters, request) for request in running)
    pinned(adapters, VISION)
    assert VISION not in on_device(adapters)
    adapters.prefetch([])
    staged(adapters)
    adapters.release(running[0])
    adapters.prefetch([running[0]])
    assert on_device(adapters) == [VISION, B]


def test_a_version_that_would_take_the_place_of_others_is_no_pinned_one(adapters_of):
    adapters = adapters_of(lora_pages=7)
    loaded(adapters, "name", ADAPTERS / A)
    loaded(adapters, WIDE)
    pinned(adapters, "name")
    with pytest.raises(AdapterError, match="needs 4 pages of rank rows, pinned ones would leave 3"):
        loaded(adapters, "name", ADAPTERS / WIDE)
    assert [info.pinned for info in adapters.infos()] == [False, True]
    loaded(adapters, "name", ADAPTERS / B)


def test_a_pin_moves_to_the_version_that_is_loaded_and_ends_with_the_name(adapters_of):
    adapters = adapters_of(max_adapters=2)
    loaded(adapters, "name", ADAPTERS / A)
    pinned(adapters, "name")
    info = loaded(adapters, "name", ADAPTERS / B)
    assert info.pinned
    for _ in range(2):  # staged, then placed
        adapters.prefetch([])
        staged(adapters)
    assert (adapters.infos(), adapters.slot_of(info.ref) is not None) == ([info], True)
    adapters.unload("name")
    assert (adapters.infos(), adapters.residency.pinned) == ([], ())


def test_adapters_of_all_kinds_come_without_a_compilation(adapters_of):
    adapters = adapters_of()
    adapters.warm_up()
    for name in (A, VISION, WIDE, "a09_lm_head_saved", "a10_new_head"):
        loaded(adapters, name)
        user = request_of(adapters.hold(name))
        jax.config.update("jax_no_tracing", True)
        try:
            assert acquired(adapters, user)
        finally:
            jax.config.update("jax_no_tracing", False)
        adapters.release(user)
