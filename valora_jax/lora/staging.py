"""Adapters on their way to the device: made ready in one thread beside the engine's.

The thread reads an adapter's folder again if it must, fills its blocks up and waits for their copy
to the device; what is left to the engine's thread is to enqueue writes from there to the pool. That
takes device memory beside the pool's; `DeviceAdapters.staged_bytes` says how much is set aside.
"""

from collections.abc import Callable, Sequence
from concurrent import futures

from valora_jax.lora.host_store import AdapterRef

MAX_STAGED = 2  # one that waits for its place while the next one comes


class Staging[Blocks]:
    """Holds versions from when they are asked for until they are dropped. For one thread.

    What has become of them is seen at `collect` and `wait`, and does not change in between: the
    scheduler must not find the same adapter missing for one request and there for the next.
    """

    def __init__(self, make: Callable[[AdapterRef], Blocks], *, limit: int):
        """Starts nothing yet.

        Args:
          make: what the thread does for a version; an `Exception` that it raises is kept.
          limit: versions under way or made, those that failed aside.
        """
        self._make, self._limit = make, limit
        self._thread: futures.ThreadPoolExecutor | None = None
        self._asked: dict[AdapterRef, futures.Future[Blocks]] = {}
        self._made: dict[AdapterRef, Blocks] = {}
        self._failed: dict[AdapterRef, Exception] = {}

    def ask(self, ref: AdapterRef) -> None:
        """Stages a version, unless that has been asked for, or there are too many."""
        if ref in self._failed or ref in (held := self._held()) or len(held) >= self._limit:
            return
        if self._thread is None:
            self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="staging")
        self._asked[ref] = self._thread.submit(self._make, ref)

    def prefer(self, refs: Sequence[AdapterRef]) -> None:
        """Stages the first `limit` versions that did not fail, if need be in place of others."""
        first = [ref for ref in refs if ref not in self._failed][: self._limit]
        others = [ref for ref in self._held() if ref not in first]
        excess = len(first) + len(others) - self._limit
        for ref in others[::-1][: max(0, excess)]:
            self.drop(ref)
        for ref in first:
            self.ask(ref)

    def get(self, ref: AdapterRef) -> Blocks | None:
        """What was made of a version; None if it is not ready, or failed."""
        return self._made.get(ref)

    def error(self, ref: AdapterRef) -> Exception | None:
        """What kept a version from being made; None if nothing did."""
        return self._failed.get(ref)

    @property
    def busy(self) -> bool:
        """Whether something is under way, as far as has been collected."""
        return bool(self._asked)

    def drop(self, ref: AdapterRef) -> None:
        """Forgets a version; what is under way is freed once the thread is done with it."""
        if (future := self._asked.pop(ref, None)) is not None:
            future.cancel()
        self._made.pop(ref, None)
        self._failed.pop(ref, None)

    def collect(self) -> None:
        """Takes what the thread has done."""
        for ref, future in list(self._asked.items()):
            if not future.done():
                continue
            del self._asked[ref]
            try:
                self._made[ref] = future.result()
            except Exception as error:
                self._failed[ref] = error

    def wait(self, timeout_s: float) -> bool:
        """Waits until the thread has done something, and collects; False if it does nothing."""
        if not self._asked:
            return False
        futures.wait(self._asked.values(), timeout_s, futures.FIRST_COMPLETED)
        self.collect()
        return True

    def close(self) -> None:
        """Forgets all versions and ends the thread; another one starts if it is needed."""
        for ref in (*self._asked, *self._made, *self._failed):
            self.drop(ref)
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _held(self) -> list[AdapterRef]:
        """Versions that take memory, or will: those that were asked for last come last."""
        return [*self._made, *self._asked]
