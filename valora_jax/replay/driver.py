"""Open-loop load: requests come when they are due, however far behind the engine is."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from valora_jax.replay.arrivals import Arrival


class Core(Protocol):
    """The engine's loop; `EngineCore`."""

    @property
    def has_work(self) -> bool: ...
    def step(self) -> object: ...


def drive(
    core: Core,
    trace: Sequence[Arrival],
    add: Callable[[int], None],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """Replays a trace to the end of its last answer.

    Requests that come during a step are added after it, so that they wait as they would for an
    engine that others drive. Sleeps only while there is nothing to do.

    Args:
      core: without work.
      trace: in order of arrival.
      add: adds the nth request of the trace to the core.
      clock: in seconds.
      sleep: for seconds on that clock.

    Returns:
      When the trace began, on the clock.
    """
    start_s, added = clock(), 0
    while added < len(trace) or core.has_work:
        now_s = clock() - start_s
        while added < len(trace) and trace[added].at_s <= now_s:
            add(added)
            added += 1
        if core.has_work:
            core.step()
        elif added < len(trace):
            sleep(trace[added].at_s - now_s)
    return start_s
