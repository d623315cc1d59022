"""The engine's adapters: loaded by name on the host, placed on the device for those who run.

A scheduler's gate: a request holds the place of its adapter while it runs. Also what the runner
asks for the arrays of a step.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from valora_jax.config import EngineConfig
from valora_jax.engine.request import Request
from valora_jax.engine.step import AdapterArrays
from valora_jax.errors import AdapterError
from valora_jax.lora.adapter import Adapter, AdapterTarget, Linear
from valora_jax.lora.combine import Kind, combine, with_base
from valora_jax.lora.heads import HeadPool, TaskHeadPool, TaskHeads, head_bytes
from valora_jax.lora.host_store import AdapterInfo, AdapterRef, HostStore
from valora_jax.lora.pool import DevicePool, pages_needed, pool_bytes
from valora_jax.lora.read import read_adapter
from valora_jax.lora.residency import REPLACED_HEADS, Residency

type LinearOf = Callable[[str, int], Linear]


def _site_pages(config: EngineConfig, target: AdapterTarget) -> dict[str, int]:
    """Site -> pages of its pool; page 0 is zeros."""
    pages = {
        site.name: 1
        + (config.projector_lora_pages if _in_projector(site.name) else config.lora_pages)
        for site in target.sites
    }
    return pages | {REPLACED_HEADS: 1 + config.max_replaced_heads}


def _in_projector(site: str) -> bool:
    return site.startswith("projector.")


def _in_vision(site: str) -> bool:
    return site.startswith(("vision.", "projector."))


def _biased_sites(target: AdapterTarget) -> list[str]:
    """Where adapters replace linears whole, biases included."""
    return [site.name for site in target.sites if _in_projector(site.name)]


class EngineAdapters:
    """Loads, places and forgets adapters.

    Attributes:
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
    ):
        """Takes the device's memory for adapters.

        Args:
          dtype: of adapters on the device.
          linear_of: site name and layer -> the base's linear.
          head_VD: the base's head.
        """
        self._target, self._linear_of, self._head_VD = target, linear_of, head_VD
        self._store = HostStore(max_bytes=config.host_adapter_bytes, reread=self._read)
        self.pages_of_site = _site_pages(config, target)
        slots = config.max_adapters
        self._residency = Residency(self.pages_of_site, slots=slots)
        self._pool = DevicePool(
            target,
            pages_of_site=self.pages_of_site,
            slots=slots,
            dtype=dtype,
            biased_sites=_biased_sites(target),
        )
        self._heads = HeadPool(target, heads=config.max_replaced_heads, slots=slots, dtype=dtype)
        self._task_heads = TaskHeadPool(target, slots=slots, max_classes=config.max_classes)
        self._slot_of: dict[Request, int] = {}
        self._failures: list[tuple[Request, Exception]] = []
        self._uploads = 0
        self._needs: dict[AdapterRef, Mapping[str, int]] = {}
        self._classes: dict[AdapterRef, int] = {}
        self.on_forget: Callable[[AdapterRef], None] = lambda ref: None

    @staticmethod
    def device_bytes(config: EngineConfig, target: AdapterTarget, *, dtype: np.dtype) -> int:
        """What an instance would take."""
        pages, slots = _site_pages(config, target), config.max_adapters
        biased = _biased_sites(target)
        return (
            pool_bytes(target, pages_of_site=pages, slots=slots, dtype=dtype, biased_sites=biased)
            + head_bytes(target, heads=config.max_replaced_heads, slots=slots, dtype=dtype)
            + slots * config.max_classes * (target.width + 1) * 4
        )

    def warm_up(self) -> None:
        """Compiles the uploads; before any adapter is placed."""
        for part in (self._pool, self._heads, self._task_heads):
            part.warm_up()

    def load(self, name: str, folder: Path) -> AdapterInfo:
        """Reads an adapter folder and gives its name this new version.

        Raises:
          AdapterError: it does not fit the model, or is too large for the device's pool.
          NotImplementedError: it is of a kind that is not served.
          TensorFileError: its file is damaged.
        """
        return self.register(self._read(folder, name), path=folder)

    def register(self, adapter: Adapter, *, path: Path | None = None) -> AdapterInfo:
        """Gives an adapter's name this new version.

        Args:
          adapter: one that does not need the base any more.
          path: the folder that it can be read from again; without one it stays in memory.

        Raises:
          AdapterError: it is too large for the device's pool.
          OutOfCapacityError: too many adapters without a folder are in memory.
        """
        need = pages_needed(adapter)
        faults = [
            *self._residency.refusals(need),
            *self._pool.refusals(adapter),
            *self._task_heads.refusals(adapter),
        ]
        if faults:
            raise AdapterError(adapter.name, faults)
        ref = self._store.register(adapter, path=path)
        self._needs[ref] = need
        if adapter.task_head is not None:
            self._classes[ref] = adapter.task_head.weight_CD.shape[0]
        known = {info.ref: info for info in self._store.list_adapters()}
        for old in self._needs.keys() - known.keys():
            self._forget(old)
        return known[ref]

    def combine(self, name: str, parts: Mapping[str, float], *, kind: Kind) -> AdapterInfo:
        """Makes an adapter of loaded ones; see `lora.combine.combine`."""
        adapters = [(self._store.get(self._store.resolve(p)), w) for p, w in parts.items()]
        return self.register(combine(name, adapters, kind=kind))

    def unload(self, name: str) -> None:
        """Takes the name away at once; requests that use the version finish on it."""
        self._forget_if_gone(self._store.unregister(name))

    def infos(self) -> list[AdapterInfo]:
        return self._store.list_adapters()

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
        self._forget_if_gone(ref)

    def acquire(self, request: Request) -> bool:
        """Places the request's adapter, enqueueing its upload if it is not on the device."""
        if (ref := request.adapter) is None:
            self._slot_of[request] = -1
            return True
        placement = self._residency.acquire(ref, self._needs[ref])
        if placement is None:
            return False
        if placement.fresh:
            try:  # only now: who waits for a place must not read its folder at every step
                adapter = self._store.get(ref)
            except (ValueError, OSError, NotImplementedError) as error:
                # Its folder changed or went away after its arrays were dropped.
                self._failures.append((request, error))
                self._residency.release(ref)
                self._residency.drop(ref)
                return False
            for part in (self._pool, self._heads, self._task_heads):
                part.upload(adapter, placement)
            self._uploads += 1
        self._slot_of[request] = placement.slot
        return True

    def take_failures(self) -> list[tuple[Request, Exception]]:
        """Requests whose adapter cannot be read again, since the last call."""
        failures, self._failures = self._failures, []
        return failures

    def release(self, request: Request) -> None:
        del self._slot_of[request]
        if request.adapter is not None:
            self._residency.release(request.adapter)

    def slot(self, request: Request) -> int:
        """The adapter slot of a running request, -1 for the base model."""
        return self._slot_of[request]

    def slot_of(self, ref: AdapterRef) -> int | None:
        """The slot of a version whose arrays are on the device, whether it is in use or not."""
        return self._residency.slot_of(ref)

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
            pools=self._pool.pools,
            biases_LSE=self._pool.biases_LSE,
            heads=self._heads.heads,
        )

    @property
    def task_heads(self) -> TaskHeads:
        return self._task_heads.heads

    @property
    def uploads(self) -> int:
        """How often a version was written to the device."""
        return self._uploads

    @property
    def placed(self) -> int:
        """Versions on the device that some request uses."""
        return self._residency.in_use

    def _read(self, folder: Path, name: str) -> Adapter:
        adapter = read_adapter(folder, name=name, target=self._target)
        return with_base(adapter, linear_of=self._linear_of, head_VD=self._head_VD)

    def _forget_if_gone(self, ref: AdapterRef) -> None:
        if ref not in {info.ref for info in self._store.list_adapters()}:
            self._forget(ref)

    def _forget(self, ref: AdapterRef) -> None:
        self._residency.drop(ref)
        self._needs.pop(ref, None)
        self._classes.pop(ref, None)
        self.on_forget(ref)
