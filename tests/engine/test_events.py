import logging

from valora_jax.engine.events import AdapterEvicted, Events, MergeBegun
from valora_jax.lora.host_store import AdapterRef

CARS = AdapterRef(name="cars", version=1)
BEGUN, EVICTED = MergeBegun(adapter=CARS), AdapterEvicted(adapter=CARS)


def test_everybody_hears_everything_until_they_stop():
    events, first, second = Events(), [], []
    stop = events.listen(first.append)
    events.listen(second.append)
    events.send(BEGUN)
    stop()
    stop()  # once more is no mistake
    events.send(EVICTED)
    assert (first, second) == ([BEGUN], [BEGUN, EVICTED])


def test_the_same_function_may_listen_twice():
    events, heard = Events(), []
    stop = events.listen(heard.append)
    events.listen(heard.append)
    events.send(BEGUN)
    stop()
    events.send(BEGUN)
    assert heard == [BEGUN] * 3


def test_it_is_known_whether_anybody_listens():
    events = Events()
    assert not events.heard
    stop = events.listen(print)
    assert events.heard
    stop()
    assert not events.heard


def test_a_listener_that_fails_is_logged_once_and_disturbs_nobody(caplog):
    events, heard = Events(), []
    events.listen(lambda event: 1 / 0)
    events.listen(heard.append)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            events.send(BEGUN)
    assert heard == [BEGUN] * 3
    [record] = caplog.records
    assert "'cars'" in record.getMessage()
    assert record.exc_info[0] is ZeroDivisionError


def test_a_listener_may_stop_while_it_listens():
    events, heard = Events(), []
    stop = events.listen(lambda event: stop())
    events.listen(heard.append)
    events.send(BEGUN)
    events.send(BEGUN)
    assert heard == [BEGUN] * 2
