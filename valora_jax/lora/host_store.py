"""Every registered adapter on the host: names, immutable versions, and who still uses them.

Loading a name again makes a new version; requests finish on the one that they started with, which
then goes. Memory is bounded: the arrays of versions that came from a folder are dropped, least
recently used first, and read again when needed.
"""

import dataclasses
import itertools
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from valora_jax.errors import AdapterNotFoundError, OutOfCapacityError
from valora_jax.lora.adapter import Adapter


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRef:
    """One immutable version of an adapter; versions are unique within a store."""

    name: str
    version: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NewAdapter:
    """An adapter to register.

    Attributes:
      adapter: one that does not need the base any more.
      path: the folder that it can be read from again; None if there is none.
      fingerprint: of what is there.
    """

    adapter: Adapter
    path: Path | None = None
    fingerprint: str | None = None

    @classmethod
    def of_folder(cls, path: Path, adapter: Adapter) -> "NewAdapter":
        """One that was read from a folder; looks at every number for the fingerprint."""
        return cls(adapter=adapter, path=path, fingerprint=adapter.fingerprint())


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterInfo:
    """One version, for people and front ends.

    Attributes:
      ref: name and version.
      source: where it came from.
      bound: what it changes in the model.
      size_bytes: of its arrays on the host.
      users: requests that hold it.
      current: whether the name means this version; others only finish their requests.
      in_memory: whether its arrays are on the host now.
      pinned: whether it stays on the device, once it has a place there.
    """

    ref: AdapterRef
    source: str
    bound: str
    size_bytes: int
    users: int
    current: bool
    in_memory: bool
    pinned: bool


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class _Version:
    ref: AdapterRef
    adapter: Adapter | None
    path: Path | None
    fingerprint: str | None  # only of versions that may be read again
    source: str
    bound: str
    size_bytes: int
    users: int = 0


class HostStore:
    """Safe to use from several threads; reading a folder again does not hold the others up."""

    def __init__(self, *, max_bytes: int, reread: Callable[[Path, str], Adapter]):
        """Makes an empty store.

        Args:
          max_bytes: of arrays kept. Versions without a folder always stay.
          reread: reads an adapter from a folder under a name, exactly as it was registered.
        """
        self._max_bytes, self._reread = max_bytes, reread
        self._numbers = itertools.count(1)
        self._versions: dict[AdapterRef, _Version] = {}  # least recently used first
        self._current: dict[str, AdapterRef] = {}
        self._lock = threading.Lock()

    def register(self, new: NewAdapter) -> AdapterRef:
        """Adds a version and lets the adapter's name mean it.

        Raises:
          ValueError: the adapter still needs the base.
          OutOfCapacityError: what cannot be read again would exceed `max_bytes`.
        """
        adapter = new.adapter
        if adapter.needs_base:
            raise ValueError(f"adapter {adapter.name!r} has replaced weights; call with_base first")
        version = _Version(
            ref=AdapterRef(name=adapter.name, version=next(self._numbers)),
            adapter=adapter,
            path=new.path,
            fingerprint=new.fingerprint,
            source=adapter.source,
            bound=adapter.bound(),
            size_bytes=adapter.size_bytes,
        )
        with self._lock:
            old = self._current.get(adapter.name)
            self._check_room(version, old)
            self._versions[version.ref] = version
            self._current[adapter.name] = version.ref
            if old is not None:
                self._forget_if_done(old)
            self._shrink()
        return version.ref

    def unregister(self, name: str) -> AdapterRef:
        """Takes a name away at once; its version goes when the last request releases it.

        Raises:
          AdapterNotFoundError: there is no such name.
        """
        with self._lock:
            ref = self._resolve(name)
            del self._current[name]
            self._forget_if_done(ref)
        return ref

    def resolve(self, name: str) -> AdapterRef:
        """The newest version of a name.

        Raises:
          AdapterNotFoundError: there is no such name.
        """
        with self._lock:
            return self._resolve(name)

    def hold(self, ref: AdapterRef) -> None:
        """Keeps a version for one more request.

        Raises:
          AdapterNotFoundError: the version is gone.
        """
        with self._lock:
            self._find(ref).users += 1

    def release(self, ref: AdapterRef) -> None:
        """Gives back one `hold`.

        Raises:
          ValueError: nobody holds it.
        """
        with self._lock:
            if (version := self._versions.get(ref)) is None or version.users == 0:
                raise ValueError(f"{ref} is released and nobody holds it")
            version.users -= 1
            self._forget_if_done(ref)

    def get(self, ref: AdapterRef) -> Adapter:
        """The adapter itself, read again if its arrays were dropped.

        Raises:
          AdapterNotFoundError: the version is gone.
          ValueError: its folder has other content by now; also whatever `reread` raises.
        """
        with self._lock:
            version = self._find(ref)
            self._versions[ref] = self._versions.pop(ref)  # to the end: most recently used
            if (adapter := version.adapter) is not None:
                return adapter
        assert version.path is not None  # _shrink drops no other arrays
        adapter = self._reread(version.path, ref.name)
        if adapter.fingerprint() != version.fingerprint:
            raise ValueError(
                f"adapter {ref.name!r} version {ref.version}: {version.path} has changed since it "
                "was loaded; load it again to serve what is there now"
            )
        with self._lock:
            version.adapter = adapter
            self._shrink()
        return adapter

    def __contains__(self, ref: AdapterRef) -> bool:
        """Whether a version can still be used."""
        with self._lock:
            return ref in self._versions

    def users(self, ref: AdapterRef) -> int:
        """How many requests hold a version; 0 if it is gone."""
        with self._lock:
            return 0 if (version := self._versions.get(ref)) is None else version.users

    def list_adapters(self, *, pinned: Collection[AdapterRef] = ()) -> list[AdapterInfo]:
        """Every version that can still be used, sorted by name and version.

        Args:
          pinned: versions to be marked as such; the store knows nothing of the device.
        """
        with self._lock:
            versions = sorted(self._versions.values(), key=lambda v: (v.ref.name, v.ref.version))
            return [
                AdapterInfo(
                    ref=v.ref,
                    source=v.source,
                    bound=v.bound,
                    size_bytes=v.size_bytes,
                    users=v.users,
                    current=self._is_current(v.ref),
                    in_memory=v.adapter is not None,
                    pinned=v.ref in pinned,
                )
                for v in versions
            ]

    def _resolve(self, name: str) -> AdapterRef:
        if (ref := self._current.get(name)) is None:
            raise AdapterNotFoundError(name, list(self._current))
        return ref

    def _find(self, ref: AdapterRef) -> _Version:
        if (version := self._versions.get(ref)) is None:
            raise AdapterNotFoundError(f"{ref.name} version {ref.version}", list(self._current))
        return version

    def _is_current(self, ref: AdapterRef) -> bool:
        return self._current.get(ref.name) == ref

    def _forget_if_done(self, ref: AdapterRef) -> None:
        if not self._is_current(ref) and self._versions[ref].users == 0:
            del self._versions[ref]

    def _check_room(self, new: _Version, old: AdapterRef | None) -> None:
        if new.path is not None:
            return
        staying = [
            v.size_bytes
            for v in self._versions.values()
            if v.path is None and (v.ref != old or v.users)
        ]
        if (total := new.size_bytes + sum(staying)) > self._max_bytes:
            raise OutOfCapacityError(
                f"adapter {new.ref.name!r} has no folder and would always stay in memory: with "
                f"{len(staying)} others of its kind it takes {total} bytes, the host keeps "
                f"{self._max_bytes}; unload some or raise EngineConfig.host_adapter_bytes"
            )

    def _shrink(self) -> None:
        """Drops arrays that can be read again until the rest is within bounds."""
        kept = [v for v in self._versions.values() if v.adapter is not None]
        excess_bytes = sum(v.size_bytes for v in kept) - self._max_bytes
        droppable = [v for v in kept if v.path is not None]
        # Those that nobody waits for go first; then those whose folder is still their own, as far
        # as is known: a superseded version's folder may hold its successor.
        droppable.sort(key=lambda v: (v.users > 0, not self._is_current(v.ref)))
        for version in droppable:
            if excess_bytes <= 0:
                return
            version.adapter = None
            excess_bytes -= version.size_bytes
