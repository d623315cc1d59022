"""The engine's adapters: loaded by name on the host, placed on the device for those who run.

A scheduler's gate: a request holds the place of its adapter while it runs. Also what the runner
asks for the arrays of a step. What takes time, from the folder to the device's memory, happens in a
thread beside the engine's (`lora.staging`), which then only enqueues writes between steps.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from valora_jax.config import EngineConfig
from valora_jax.engine.events import AdapterEvicted, AdapterUnloaded, AdapterUploaded, Events
from valora_jax.engine.request import Request
from valora_jax.engine.step import AdapterArrays
from valora_jax.errors import AdapterError, OutOfCapacityError
from valora_jax.lora.adapter import Adapter, AdapterTarget, Linear
from valora_jax.lora.blocks import pages_needed
from valora_jax.lora.combine import Kind, combine, with_base
from valora_jax.lora.device import DeviceAdapters, StagedAdapter
from valora_jax.lora.heads import TaskHeads
from valora_jax.lora.host_store import AdapterInfo, AdapterRef, HostStore, NewAdapter
from valora_jax.lora.read import read_adapter
from valora_jax.lora.residency import Residency
from valora_jax.lora.staging import MAX_STAGED, Staging

type LinearOf = Callable[[str, int], Linear]

# Waiting requests whose adapters are kept or fetched. More would seldom run before they are asked
# for again.
LOOKAHEAD_REQUESTS = 32
# Whoever waits for a step holds the engine's lock, and others may bring requests meanwhile.
_WAIT_S = 0.01


def _in_vision(site: str) -> bool:
    return site.startswith(("vision.", "projector."))


class EngineAdapters:
    """Loads, places and forgets adapters.

    Attributes:
      residency: who is on the device and where, to be asked only.
      on_forget: hears of every version that no request will bring again.
    """

    def __init__(
        self,
        config: EngineConfig,
        target: AdapterTarget,
        *,
        dtype: np.dtype,
        linear_of: LinearOf,
        head_VD: Callable[[], np.ndarray],
        events: Events,
    ):
        """Takes the device's memory for adapters.

        Args:
          dtype: of adapters on the device.
          linear_of: site name and layer -> the base's linear.
          head_VD: the base's head.
          events: hear who comes and goes.
        """
        self._target, self._linear_of, self._head_VD = target, linear_of, head_VD
        self._events = events
        self._store = HostStore(max_bytes=config.host_adapter_bytes, reread=self._read)
        self._device = DeviceAdapters(config, target, dtype=dtype)
        self.residency = Residency(self._device.pages_of_site, slots=config.max_adapters)
        self.residency.on_evict = lambda ref: events.send(AdapterEvicted(adapter=ref))
        self._staging = Staging(self._stage, limit=MAX_STAGED)
        self._slot_of: dict[Request, int] = {}
        self._failures: dict[Request, Exception] = {}
        self._needs: dict[AdapterRef, Mapping[str, int]] = {}
        self._classes: dict[AdapterRef, int] = {}
        self.on_forget: Callable[[AdapterRef], None] = lambda ref: None

    def warm_up(self) -> None:
        """Compiles the writes; before any adapter is placed."""
        self._device.warm_up()

    def read(self, name: str, folder: Path) -> NewAdapter:
        """Reads an adapter folder, for `register`; safe in any thread.

        Raises:
          AdapterError: it does not fit the model.
          NotImplementedError: it is of a kind that is not served.
          TensorFileError: its file is damaged.
        """
        return NewAdapter.of_folder(folder, self._read(folder, name))

    def combined(self, name: str, parts: Mapping[str, float], *, kind: Kind) -> NewAdapter:
        """Makes an adapter of loaded ones, see `lora.combine.combine`; safe in any thread."""
        adapters = [(self._store.get(self._store.resolve(p)), w) for p, w in parts.items()]
        return NewAdapter(adapter=combine(name, adapters, kind=kind))

    def register(self, new: NewAdapter) -> AdapterInfo:
        """Gives an adapter's name this new version. The pin of a name moves to it, too.

        Raises:
          AdapterError: it is too large for what pinned adapters leave of the device's pool, or, as
            a pinned one, would leave too little to others.
          OutOfCapacityError: too many adapters without a folder are in memory.
        """
        adapter = new.adapter
        need, old = pages_needed(adapter), self._pinned(adapter.name)
        faults = [
            *self.residency.refusals(need, instead_of=old),
            *self._device.refusals(adapter),
        ]
        if old is not None and not faults:
            staying = [r for r in self.residency.pinned if r != old or not self._store.users(old)]
            others = self._needs_but(staying)
            faults = self.residency.pin_refusals(need, others, instead_of=old)
        if faults:
            raise AdapterError(adapter.name, faults)
        ref = self._store.register(new)
        self._needs[ref] = need
        if adapter.task_head is not None:
            self._classes[ref] = adapter.task_head.weight_CD.shape[0]
        if old is not None:
            self.residency.unpin(old)
            self.residency.pin(ref, need)
        known = {info.ref: info for info in self.infos()}
        for gone in self._needs.keys() - known.keys():
            self._forget(gone)
        return known[ref]

    def unload(self, name: str) -> None:
        """Takes the name and its pin away at once; requests that use the version finish on it."""
        ref = self._store.unregister(name)
        self.residency.unpin(ref)
        self._forget_if_gone(ref)

    def pin(self, name: str) -> AdapterRef:
        """Lets an adapter stay on the device from when it is there, see `coming`.

        Raises:
          AdapterNotFoundError: there is no such name.
          OutOfCapacityError: with all pins, some other adapter would never find a place.
        """
        ref, pinned = self.resolve(name), self.residency.pinned
        if ref in pinned:
            return ref
        faults = self.residency.pin_refusals(self._needs[ref], self._needs_but([*pinned, ref]))
        if faults:
            reasons = "\n  ".join(faults)
            raise OutOfCapacityError(f"adapter {name!r} cannot be pinned:\n  {reasons}")
        self.residency.pin(ref, self._needs[ref])
        return ref

    def coming(self, ref: AdapterRef) -> bool:
        """Brings a pinned version to the device; does not wait.

        Returns:
          Whether it is on its way: not if it is there, lacks nothing but room, or is not pinned.

        Raises:
          ValueError, OSError, NotImplementedError: it was to be read again, and its folder changed
            or went away. It is pinned no more.
        """
        if ref not in self.residency.pinned:
            return False
        self._bring()
        if (error := self._staging.error(ref)) is not None:
            self.residency.unpin(ref)
            self._staging.drop(ref)
            raise error
        ready = ref in self.residency or self._staging.get(ref) is not None
        return not ready and self._staging.busy

    def unpin(self, name: str) -> None:
        """Lets an adapter go when its place is needed; one that is not pinned stays as it is.

        Raises:
          AdapterNotFoundError: there is no such name.
        """
        self.residency.unpin(self.resolve(name))

    def infos(self) -> list[AdapterInfo]:
        return self._store.list_adapters(pinned=self.residency.pinned)

    def resolve(self, name: str) -> AdapterRef:
        """The newest version of a name; raises AdapterNotFoundError."""
        return self._store.resolve(name)

    def hold(self, name: str) -> AdapterRef:
        """Keeps the newest version of a name until `let_go`, loaded or not.

        Raises:
          AdapterNotFoundError: there is no such name.
        """
        ref = self._store.resolve(name)
        self._store.hold(ref)
        return ref

    def let_go(self, ref: AdapterRef) -> None:
        self._store.release(ref)
        if not self._store.users(ref) and ref not in self.residency.pinned:
            self._staging.drop(ref)
        self._forget_if_gone(ref)

    def prefetch(self, requests: Iterable[Request]) -> None:
        """Brings adapters of waiting requests to the device ahead of their turn; does not wait.

        Looks at the first requests alone. Their adapters take free places and those of adapters
        that nobody wants; one that finds none stays ready until there is one.

        Args:
          requests: all that wait, in their order.
        """
        first = itertools.islice(requests, LOOKAHEAD_REQUESTS)
        wanted = dict.fromkeys(r.adapter for r in first if r.adapter is not None)
        self.residency.want(wanted)
        self._bring()

    def wait(self) -> bool:
        """Waits a moment for an adapter that is on its way to the device.

        Returns:
          False, at once, if none is. True does not say that one has come.
        """
        return self._staging.wait(_WAIT_S)

    def close(self) -> None:
        """Ends the thread that brings adapters to the device until it is needed again."""
        self._staging.close()

    def acquire(self, request: Request) -> bool:
        """Takes the place of the request's adapter, or has it brought to the device for later."""
        if (ref := request.adapter) is None:
            self._slot_of[request] = -1
            return True
        if ref not in self.residency and not self._place_staged(ref):
            if (error := self._staging.error(ref)) is None:
                self._staging.ask(ref)
            else:
                self._failures[request] = error
            return False
        self._slot_of[request] = self.residency.acquire(ref)
        return True

    def take_failures(self) -> list[tuple[Request, Exception]]:
        """Requests whose turn came with an adapter that could not be read again, since the last
        call. Reading is tried anew for others that come."""
        failures, self._failures = self._failures, {}
        for request in failures:
            if request.adapter is not None:
                self._staging.drop(request.adapter)
        return [*failures.items()]

    def release(self, request: Request) -> None:
        del self._slot_of[request]
        if request.adapter is not None:
            self.residency.release(request.adapter)

    def slot(self, request: Request) -> int:
        """The adapter slot of a running request, -1 for the base model."""
        return self._slot_of[request]

    def vision_slot(self, request: Request) -> int:
        """The same for its images: -1 also where its adapter leaves tower and projector alone."""
        ref = request.adapter
        return self.slot(request) if ref is not None and self.changes_vision(ref) else -1

    def slot_of(self, ref: AdapterRef) -> int | None:
        """The slot of a version whose arrays are on the device, whether it is in use or not."""
        return self.residency.slot_of(ref)

    def pages(self, ref: AdapterRef) -> Mapping[str, int]:
        """Site -> pages of the device's pool that a loaded version takes."""
        return self._needs[ref]

    def changes_vision(self, ref: AdapterRef) -> bool:
        return any(_in_vision(site) for site in self._needs[ref])

    def classes(self, ref: AdapterRef) -> int:
        """How many classes the adapter's task head knows; 0 without one."""
        return self._classes.get(ref, 0)

    def arrays(self) -> AdapterArrays:
        return AdapterArrays(
            pools=self._device.pool.pools,
            biases_LSE=self._device.pool.biases_LSE,
            heads=self._device.heads.heads,
        )

    @property
    def task_heads(self) -> TaskHeads:
        return self._device.task_heads.heads

    @property
    def uploads(self) -> int:
        """How often a version was written to the device."""
        return self._device.uploads

    def _read(self, folder: Path, name: str) -> Adapter:
        adapter = read_adapter(folder, name=name, target=self._target)
        return with_base(adapter, linear_of=self._linear_of, head_VD=self._head_VD)

    def _stage(self, ref: AdapterRef) -> StagedAdapter:
        return self._device.stage(self._store.get(ref))

    def _bring(self) -> None:
        """Places what is pinned or wanted and ready for it, and has what comes next made ready."""
        self._staging.collect()
        missing = dict.fromkeys([*self.residency.pinned, *self.residency.wanted])
        missing = [ref for ref in missing if ref not in self.residency]
        self._staging.prefer([ref for ref in missing if not self._place_staged(ref)])

    def _place_staged(self, ref: AdapterRef) -> bool:
        """Writes a version to a place, if it is staged and there is one."""
        if (staged := self._staging.get(ref)) is None:
            return False
        if (placement := self.residency.place(ref, self._needs[ref])) is None:
            return False
        self._device.write(staged, placement)
        self._staging.drop(ref)
        self._events.send(AdapterUploaded(adapter=ref, slot=placement.slot))
        return True

    def _pinned(self, name: str) -> AdapterRef | None:
        """The version of a name that is pinned."""
        return next((ref for ref in self.residency.pinned if ref.name == name), None)

    def _needs_but(self, refs: Collection[AdapterRef]) -> dict[str, Mapping[str, int]]:
        """What all other versions need."""
        return {
            f"{ref.name} version {ref.version}": need
            for ref, need in self._needs.items()
            if ref not in refs
        }

    def _forget_if_gone(self, ref: AdapterRef) -> None:
        if ref not in self._store:
            self._forget(ref)

    def _forget(self, ref: AdapterRef) -> None:
        self.residency.drop(ref)
        self._staging.drop(ref)
        self._needs.pop(ref, None)
        self._classes.pop(ref, None)
        self.on_forget(ref)
        self._events.send(AdapterUnloaded(adapter=ref))
