"""What an engine tells those who listen: steps that ran, merges, adapters that come and go.

Listeners are called in the thread in which it happens, which holds the engine's lock: they should
be quick, may ask for the engine's metrics, and must not change anything in it.
"""

import dataclasses
import logging
import threading
from collections.abc import Callable

from valora_jax.engine.costs import StepLoad
from valora_jax.engine.rounds import Decision, Servable
from valora_jax.lora.host_store import AdapterRef
from valora_jax.lora.mode import Mode

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepRan:
    """A step was read.

    Attributes:
      start_s: on the engine's clock.
      ms: from its start, or the end of the step before, to its end.
      load: what it did.
      decision: how it was to run.
      requests: that it served.
    """

    start_s: float
    ms: float
    load: StepLoad
    decision: Decision
    requests: tuple[Servable, ...]

    @property
    def mode(self) -> Mode:
        return self.load.mode


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MergeBegun:
    """The first layers of the copy are an adapter's; the copy is no other adapter's any more."""

    adapter: AdapterRef


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MergeWhole:
    """All layers of the copy are an adapter's: it is folded in, and steps may use it."""

    adapter: AdapterRef


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MergeInterrupted:
    """An adapter lost the copy before that was whole: to another one, or as it was unloaded."""

    adapter: AdapterRef


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MergeRefused:
    """An adapter was measured and is never merged.

    Attributes:
      reason: for people.
    """

    adapter: AdapterRef
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterUploaded:
    """An adapter was written to a slot of the device."""

    adapter: AdapterRef
    slot: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterEvicted:
    """An adapter's place on the device was needed for another; it stays loaded."""

    adapter: AdapterRef


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterUnloaded:
    """A version is gone, from the device, too: its name means another one or none, and the last
    request that used it has ended. If it was folded in, nothing is any more."""

    adapter: AdapterRef


type Event = (
    StepRan
    | MergeBegun
    | MergeWhole
    | MergeInterrupted
    | MergeRefused
    | AdapterUploaded
    | AdapterEvicted
    | AdapterUnloaded
)


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class _Listener:
    hear: Callable[[Event], None]
    failed: bool = False


class Events:
    """Those who listen to one engine. They may come and go in any thread."""

    def __init__(self):
        # Replaced and never changed, so that a `send` goes on with its own.
        self._listeners: tuple[_Listener, ...] = ()
        self._lock = threading.Lock()

    @property
    def heard(self) -> bool:
        """Whether anybody listens."""
        return bool(self._listeners)

    def listen(self, hear: Callable[[Event], None]) -> Callable[[], None]:
        """Lets a function hear of every event from now on.

        Args:
          hear: what it raises is logged the first time and goes no further.

        Returns:
          A function that ends it; calling it again does nothing.
        """
        listener = _Listener(hear=hear)

        def stop() -> None:
            with self._lock:
                self._listeners = tuple(it for it in self._listeners if it is not listener)

        with self._lock:
            self._listeners = (*self._listeners, listener)
        return stop

    def send(self, event: Event) -> None:
        """Tells everybody who listens."""
        for listener in self._listeners:
            try:
                listener.hear(event)
            except Exception:
                if not listener.failed:
                    _log.exception("a listener failed on %s; it is said once", event)
                listener.failed = True
