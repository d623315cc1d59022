import threading
from collections.abc import Iterator

import pytest

from valora_jax.lora.host_store import AdapterRef
from valora_jax.lora.staging import Staging

LONG_S = 30  # nothing waits so long unless it hangs


def ref(number: int) -> AdapterRef:
    return AdapterRef(name=f"a{number}", version=number)


class Maker:
    """Makes numbers of versions when it is let; which is at once unless `hold` is called."""

    def __init__(self):
        self.made: list[int] = []
        self.faults: set[int] = set()
        self.started, self._go_on = threading.Event(), threading.Event()
        self._go_on.set()

    def hold(self) -> None:
        self.started.clear()
        self._go_on.clear()

    def go_on(self) -> None:
        self._go_on.set()

    def __call__(self, chosen: AdapterRef) -> int:
        self.started.set()
        assert self._go_on.wait(LONG_S)
        self.made.append(chosen.version)
        if chosen.version in self.faults:
            raise ValueError(f"{chosen.name} is broken")
        return chosen.version


@pytest.fixture
def maker() -> Iterator[Maker]:
    maker = Maker()
    yield maker
    maker.go_on()


@pytest.fixture
def staging(maker) -> Iterator[Staging[int]]:
    staging = Staging(maker, limit=2)
    yield staging
    maker.go_on()
    staging.close()


def finish(staging: Staging[int]) -> None:
    while staging.wait(LONG_S):
        pass


def ready(staging: Staging[int]) -> list[int]:
    return [i for i in range(9) if staging.get(ref(i)) is not None]


def test_what_was_asked_for_is_made_once_and_stays_until_it_is_dropped(staging, maker):
    for _ in range(2):
        staging.ask(ref(1))
        finish(staging)
    assert (staging.get(ref(1)), staging.error(ref(1)), maker.made) == (1, None, [1])
    staging.drop(ref(1))
    staging.drop(ref(1))  # already
    assert staging.get(ref(1)) is None


def test_nobody_waits_for_what_is_made(staging, maker):
    maker.hold()
    staging.ask(ref(1))
    assert (staging.get(ref(1)), staging.error(ref(1))) == (None, None)
    assert staging.wait(0)  # it is still under way
    maker.go_on()
    assert staging.wait(LONG_S)
    assert not staging.wait(LONG_S)
    assert ready(staging) == [1]


def test_nothing_changes_unless_it_is_asked_what_was_done(staging, maker):
    staging.ask(ref(1))
    staging._thread.shutdown()  # it is done
    assert ready(staging) == []
    staging.collect()
    assert ready(staging) == [1]


def test_more_than_the_limit_are_not_begun(staging, maker):
    for number in (1, 2, 3):
        staging.ask(ref(number))
    finish(staging)
    assert ready(staging) == maker.made == [1, 2]


def test_those_that_are_preferred_take_the_room_of_others_that_came_last(staging):
    for number in (1, 2):
        staging.ask(ref(number))
    staging.prefer([ref(3)])
    finish(staging)
    assert ready(staging) == [1, 3]
    staging.prefer([ref(3), ref(4), ref(5)])
    finish(staging)
    assert ready(staging) == [3, 4]
    staging.prefer([])
    assert ready(staging) == [3, 4]


def test_one_that_is_dropped_before_its_turn_is_never_made(staging, maker):
    maker.hold()
    for number in (1, 2):
        staging.ask(ref(number))
    staging.drop(ref(2))
    staging.drop(ref(1))
    staging.ask(ref(3))
    maker.go_on()
    finish(staging)
    assert ready(staging) == [3]
    assert 2 not in maker.made


def test_a_failure_is_kept_and_takes_no_room(staging, maker):
    maker.faults = {1, 2}
    staging.prefer([ref(1), ref(2)])
    finish(staging)
    assert (str(staging.error(ref(1))), staging.get(ref(1))) == ("a1 is broken", None)
    staging.prefer([ref(1), ref(3), ref(4)])
    finish(staging)
    assert ready(staging) == [3, 4]
    assert maker.made == [1, 2, 3, 4]
    maker.faults.clear()
    staging.drop(ref(1))
    staging.prefer([ref(1)])
    finish(staging)
    assert ready(staging) == [1, 3]


def test_closing_ends_the_thread_with_work_under_way(maker):
    staging, threads = Staging(maker, limit=2), threading.active_count()
    maker.hold()
    for number in (1, 2):
        staging.ask(ref(number))
    assert maker.started.wait(LONG_S)
    assert threading.active_count() == threads + 1
    going_on = threading.Timer(0, maker.go_on)
    going_on.start()
    staging.close()
    going_on.join()
    staging.close()  # already
    assert not staging.wait(LONG_S)
    assert ready(staging) == []
    assert threading.active_count() == threads
    staging.ask(ref(3))
    finish(staging)
    assert ready(staging) == [3]
    staging.close()
