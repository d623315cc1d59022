import dataclasses
import shutil
import threading

import jax
import numpy as np
import pytest

from tests.engine.engines import ADAPTERS, CONFIG, GOLDENS
from valora_jax.engine.adapters import EngineAdapters
from valora_jax.engine.request import Request
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.errors import AdapterError, AdapterNotFoundError, OutOfCapacityError
from valora_jax.lora.host_store import AdapterRef
from valora_jax.lora.read import read_adapter
from valora_jax.models import read_spec
from valora_jax.models.loading import read_config

TARGET = read_spec(read_config(GOLDENS / "checkpoints" / "llava15-tiny")).adapter_target
A, B, VISION = "a01_attn_lm_r8", "a19_attn_lm_r8_b", "a05_vision_proj_r8"
WIDE = "a06_qv_r64"


@pytest.fixture
def adapters_of():
    """Makes engines' adapters and closes them; changes are of the config."""
    made = []

    def make(**changes) -> EngineAdapters:
        def no_base(*_):
            raise AssertionError("none of these adapters needs the base")

        config = dataclasses.replace(CONFIG, **changes)
        kwargs = dict(dtype=np.dtype(np.float32), linear_of=no_base, head_VD=no_base)
        made.append(EngineAdapters(config, TARGET, **kwargs))
        return made[-1]

    yield make
    for adapters in made:
        adapters.close()


def request_of(adapter: AdapterRef | None) -> Request:
    return Request(
        id="r", prompt_token_ids=[1], params=SamplingParams(max_tokens=1), adapter=adapter
    )


def staged(adapters: EngineAdapters) -> None:
    """Waits for all that is on its way to the device."""
    while adapters.wait():
        pass


def acquired(adapters: EngineAdapters, request: Request) -> bool:
    """Whether the request has its adapter at the second attempt, once that had time to come."""
    if adapters.acquire(request):
        return True
    staged(adapters)
    return adapters.acquire(request)


def on_device(adapters: EngineAdapters) -> list[str]:
    return [info.ref.name for info in adapters.infos() if adapters.slot_of(info.ref) is not None]


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
    adapters.load(A, ADAPTERS / A)
    with_a, base = request_of(adapters.hold(A)), request_of(None)
    assert acquired(adapters, with_a)
    assert adapters.acquire(base)
    assert (adapters.slot(with_a), adapters.slot(base), adapters.placed) == (0, -1, 1)
    adapters.release(with_a)
    adapters.release(base)
    assert adapters.placed == 0


def test_more_adapters_than_slots_wait_for_one(adapters_of):
    adapters = adapters_of(max_adapters=1)
    for name in (A, B):
        adapters.load(name, ADAPTERS / name)
    first, second = (request_of(adapters.hold(name)) for name in (A, B))
    assert acquired(adapters, first)
    assert not acquired(adapters, second)
    adapters.release(first)
    assert acquired(adapters, second)


def test_who_waits_for_a_slot_reads_no_folder_again(adapters_of, monkeypatch):
    adapters = adapters_of(max_adapters=1, host_adapter_bytes=0)
    for name in (A, B):
        adapters.load(name, ADAPTERS / name)
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
    adapters.load("changed", tmp_path / "a")
    adapters.load(B, ADAPTERS / B)
    shutil.copytree(ADAPTERS / B, tmp_path / "a", dirs_exist_ok=True)
    broken, other = request_of(adapters.hold("changed")), request_of(adapters.hold(B))
    assert not acquired(adapters, broken)
    ((failed, error),) = adapters.take_failures()
    assert failed is broken
    assert "has changed since it was loaded; load it again" in str(error)
    assert (adapters.take_failures(), adapters.placed) == ([], 0)
    assert acquired(adapters, other)
    adapters.release(other)
    shutil.copytree(ADAPTERS / A, tmp_path / "a", dirs_exist_ok=True)
    assert acquired(adapters, broken)  # nothing of the failure stays on the device


def test_a_reloaded_name_is_a_new_version_and_the_old_one_goes_with_its_last_user(adapters_of):
    adapters = adapters_of()
    adapters.load("name", ADAPTERS / A)
    old = adapters.hold("name")
    user = request_of(old)
    assert acquired(adapters, user)
    adapters.load("name", ADAPTERS / VISION)
    new = adapters.hold("name")
    assert new != old
    assert [(info.ref, info.current) for info in adapters.infos()] == [(old, False), (new, True)]
    assert (adapters.changes_vision(old), adapters.changes_vision(new)) == (False, True)
    adapters.release(user)
    adapters.let_go(old)
    assert [info.ref for info in adapters.infos()] == [new]
    assert old not in adapters._residency


def test_an_unloaded_adapter_finishes_and_then_leaves_the_device(adapters_of):
    adapters = adapters_of()
    adapters.load(A, ADAPTERS / A)
    user = request_of(adapters.hold(A))
    assert acquired(adapters, user)
    adapters.unload(A)
    with pytest.raises(AdapterNotFoundError, match="no adapter 'a01_attn_lm_r8'; loaded: none"):
        adapters.hold(A)
    assert adapters.placed == 1
    adapters.release(user)
    adapters.let_go(user.adapter)
    assert (adapters.infos(), adapters._residency._residents) == ([], {})


def test_a_version_says_where_it_is_and_what_it_takes(adapters_of):
    adapters = adapters_of(max_adapters=1)
    ref, other = (adapters.load(name, ADAPTERS / name).ref for name in (A, WIDE))
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
    info = adapters.register(adapter)
    assert adapters.infos() == [info]
    assert acquired(adapters, request_of(adapters.hold("made")))


def test_what_can_never_be_placed_is_refused_with_every_reason(adapters_of):
    adapters = adapters_of(lora_pages=2, max_classes=6, max_replaced_heads=0)
    with pytest.raises(AdapterError, match="needs 4 pages of rank rows, the device has 2") as error:
        adapters.load("wide", ADAPTERS / WIDE)
    assert str(error.value).count("raise EngineConfig.lora_pages") == 2
    with pytest.raises(AdapterError, match=r"7 classes.*raise EngineConfig\.max_classes"):
        adapters.load("classes", ADAPTERS / "a10_new_head")
    assert adapters.infos() == []


def test_bytes_are_those_of_the_arrays(adapters_of):
    adapters = adapters_of()
    zeros = adapters._device.pool._zeros_LrN
    arrays = jax.tree.leaves((adapters.arrays(), adapters.task_heads, zeros))
    want_bytes = EngineAdapters.device_bytes(CONFIG, TARGET, dtype=np.dtype(np.float32))
    assert sum(array.nbytes for array in arrays) == want_bytes


def test_waiting_requests_have_their_adapters_fetched_in_their_order(adapters_of):
    adapters = adapters_of(max_adapters=2)
    for name in (A, B, VISION, WIDE):
        adapters.load(name, ADAPTERS / name)
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
    adapters.load(A, ADAPTERS / A)
    adapters.prefetch([*(request_of(None) for _ in range(50)), request_of(adapters.hold(A))])
    assert not adapters.wait()


def test_who_comes_to_the_front_does_not_wait_for_those_behind(adapters_of):
    adapters = adapters_of(max_adapters=1)
    for name in (A, B, VISION, WIDE):
        adapters.load(name, ADAPTERS / name)
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
        adapters.load(name, ADAPTERS / name)
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
    adapters.load(A, tmp_path / "a")
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
    adapters.load(A, ADAPTERS / A)
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
    adapters.load(A, ADAPTERS / A)
    go_on, user = held_back(adapters), request_of(adapters.hold(A))
    adapters.prefetch([user])
    adapters.unload(A)
    go_on.set()
    assert acquired(adapters, user)
    adapters.release(user)
    adapters.let_go(user.adapter)
    assert adapters._residency._residents == {}
    adapters.load(A, ADAPTERS / A)
    adapters.prefetch([request_of(adapters.resolve(A))])  # whose engine holds nothing
    adapters.unload(A)
    assert adapters._staging._held() == []


def test_closing_ends_what_is_under_way(adapters_of, held_back):
    adapters = adapters_of()
    for name in (A, B):
        adapters.load(name, ADAPTERS / name)
    go_on = held_back(adapters)
    adapters.prefetch([request_of(adapters.hold(name)) for name in (A, B)])
    threading.Timer(0, go_on.set).start()
    adapters.close()
    assert not adapters.wait()


def test_a_pinned_adapter_comes_at_once_and_stays(adapters_of):
    adapters = adapters_of(max_adapters=2)
    for name in (A, B, VISION):
        adapters.load(name, ADAPTERS / name)
    for _ in range(2):
        adapters.pin(A)
    assert (on_device(adapters), adapters.uploads, adapters.placed) == ([A], 1, 0)
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


def test_an_adapter_that_is_there_is_pinned_where_it_is(adapters_of):
    adapters = adapters_of(host_adapter_bytes=0)
    adapters.load(A, ADAPTERS / A)
    assert acquired(adapters, request_of(adapters.hold(A)))
    adapters.pin(A)
    assert (adapters.uploads, adapters.infos()[0].pinned) == (1, True)


def test_pins_leave_a_place_to_every_other_adapter(adapters_of):
    adapters = adapters_of(max_adapters=2, lora_pages=4)
    for name in (A, B):
        adapters.load(name, ADAPTERS / name)
    adapters.pin(A)
    with pytest.raises(OutOfCapacityError, match="2 pinned adapters would take all 2 slots"):
        adapters.pin(B)
    with pytest.raises(AdapterError, match="the device has 3 beside 1 pinned adapters"):
        adapters.load(WIDE, ADAPTERS / WIDE)
    adapters.unpin(A)
    adapters.load(WIDE, ADAPTERS / WIDE)
    with pytest.raises(OutOfCapacityError, match=f"'{WIDE} version 3' needs 4 pages .* leave 3"):
        adapters.pin(A)
    assert not any(info.pinned for info in adapters.infos())


def test_a_pinned_adapter_that_finds_no_place_comes_when_there_is_one(adapters_of):
    adapters = adapters_of(max_adapters=2)
    for name in (A, B, VISION):
        adapters.load(name, ADAPTERS / name)
    running = [request_of(adapters.hold(name)) for name in (A, B)]
    assert all(acquired(adapters, request) for request in running)
    adapters.pin(VISION)
    assert VISION not in on_device(adapters)
    adapters.prefetch([])
    staged(adapters)
    adapters.release(running[0])
    adapters.prefetch([running[0]])
    assert on_device(adapters) == [VISION, B]


def test_a_version_that_would_take_the_place_of_others_is_no_pinned_one(adapters_of):
    adapters = adapters_of(lora_pages=7)
    adapters.load("name", ADAPTERS / A)
    adapters.load(WIDE, ADAPTERS / WIDE)
    adapters.pin("name")
    with pytest.raises(AdapterError, match="needs 4 pages of rank rows, pinned ones would leave 3"):
        adapters.load("name", ADAPTERS / WIDE)
    assert [info.pinned for info in adapters.infos()] == [False, True]
    adapters.load("name", ADAPTERS / B)


def test_a_pin_moves_to_the_version_that_is_loaded_and_ends_with_the_name(adapters_of):
    adapters = adapters_of(max_adapters=2)
    adapters.load("name", ADAPTERS / A)
    adapters.pin("name")
    info = adapters.load("name", ADAPTERS / B)
    assert info.pinned
    assert (adapters.infos(), adapters.slot_of(info.ref) is not None) == ([info], True)
    adapters.unload("name")
    assert (adapters.infos(), adapters._residency.pinned) == ([], ())
