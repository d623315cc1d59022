"""Which adapter versions are on the device and where: a slot, and pages of every site they use.

A version in use or pinned stays; another stays until its place is needed. Those that waiting
requests want go last, and never for a request behind them in the queue; the others go least
recently used first. This is the bookkeeping, without arrays: `pool.DevicePool` and `heads.HeadPool`
hold those. A whole replaced head is a page of the site `REPLACED_HEADS`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

from valora_jax.lora.host_store import AdapterRef

REPLACED_HEADS = "head.replaced"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a version lies on the device.

    Attributes:
      slot: its row in the arrays of scales, biases and task heads.
      pages: site -> page ids in the order of its ranks, which is ascending.
    """

    slot: int
    pages: Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class _Resident:
    placement: Placement
    users: int = 0
    dropped: bool = False

    def pages(self, site: str) -> tuple[int, ...]:
        return self.placement.pages.get(site, ())


class Residency:
    """Hands out slots and pages. Page 0 of every site is zeros and is never handed out.

    Attributes:
      on_evict: hears of every version that made room for another.
      evictions: how many did.
    """

    def __init__(self, pages_of_site: Mapping[str, int], *, slots: int):
        """Args:
        pages_of_site: site -> pages in its array, page 0 included.
        slots: adapters at once.
        """
        self.pages_of_site = dict(sorted(pages_of_site.items()))
        self._slots = slots
        self._free_slots = list(range(slots))
        self._free_pages = {s: list(range(1, n)) for s, n in self.pages_of_site.items()}
        self._residents: dict[AdapterRef, _Resident] = {}  # least recently used first
        self._wanted: dict[AdapterRef, int] = {}  # and where in the queue
        self._pinned: dict[AdapterRef, Mapping[str, int]] = {}  # and what it needs
        self.evictions = 0
        self.on_evict: Callable[[AdapterRef], None] = lambda ref: None

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref in self._residents

    def slot_of(self, ref: AdapterRef) -> int | None:
        """The slot of a version that is on the device; None for others."""
        return None if (it := self._residents.get(ref)) is None else it.placement.slot

    @property
    def resident(self) -> tuple[AdapterRef, ...]:
        """Versions that have a place, in use or not; least recently used first."""
        return tuple(self._residents)

    @property
    def pages_in_use(self) -> dict[str, int]:
        """Site -> pages that versions have, page 0 not counted."""
        return {s: n - 1 - len(self._free_pages[s]) for s, n in self.pages_of_site.items()}

    @property
    def in_use(self) -> int:
        """Versions that somebody uses."""
        return sum(resident.users > 0 for resident in self._residents.values())

    @property
    def pinned(self) -> tuple[AdapterRef, ...]:
        """Versions that stay once they have a place; oldest pin first."""
        return tuple(self._pinned)

    def refusals(
        self, need: Mapping[str, int], *, instead_of: AdapterRef | None = None
    ) -> list[str]:
        """Why an adapter that needs so many pages can never be placed; empty if it can.

        Args:
          need: site -> pages.
          instead_of: a pinned version that will be pinned no more.
        """
        left, beside = self._left(instead_of), self._beside(instead_of)
        return [
            f"{site}: needs {_counted(site, pages)}, the device has {max(0, left.get(site, 0))}"
            f"{beside}; raise EngineConfig.{_setting_of(site)}"
            for site, pages in need.items()
            if pages > left.get(site, 0)
        ]

    def pin_refusals(
        self,
        need: Mapping[str, int],
        others: Mapping[str, Mapping[str, int]],
        *,
        instead_of: AdapterRef | None = None,
    ) -> list[str]:
        """Why pinning an adapter would leave no place for others; empty if it would.

        Args:
          need: of the adapter, which `refusals` has nothing against.
          others: name -> need of each adapter that is not pinned.
          instead_of: a pinned version that will be pinned no more.
        """
        pins = len(self._pinned.keys() - {instead_of}) + 1
        faults = []
        if pins >= self._slots:
            faults.append(
                f"{pins} pinned adapters would take all {self._slots} slots; unpin one or raise "
                "EngineConfig.max_adapters"
            )
        left = self._left(instead_of)
        return faults + [
            f"{site}: adapter {name!r} needs {_counted(site, pages)}, pinned ones would leave "
            f"{left[site] - need.get(site, 0)}; unpin one or raise EngineConfig.{_setting_of(site)}"
            for name, other in others.items()
            for site, pages in other.items()
            if pages > left[site] - need.get(site, 0)
        ]

    def pin(self, ref: AdapterRef, need: Mapping[str, int]) -> None:
        """Lets a version stay from when it has a place, for which it comes before all who wait.

        The version must be one that `pin_refusals` has nothing against.
        """
        self._pinned[ref] = need

    def unpin(self, ref: AdapterRef) -> None:
        """Lets a version go again when its place is needed; it may not be pinned at all."""
        self._pinned.pop(ref, None)

    @property
    def wanted(self) -> tuple[AdapterRef, ...]:
        """What `want` said last."""
        return tuple(self._wanted)

    def want(self, refs: Iterable[AdapterRef]) -> None:
        """Says whom the waiting requests want, in the order of the queue, in place of the last."""
        self._wanted = {ref: position for position, ref in enumerate(refs)}

    def place(self, ref: AdapterRef, need: Mapping[str, int]) -> Placement | None:
        """Finds a place for a version that has none; the caller must write it there at once.

        Args:
          ref: the version.
          need: site -> pages, which `refusals` has nothing against.

        Returns:
          Where, or None, with nothing changed, while versions that must stay take up the room.
        """
        assert ref not in self._residents
        if not self._make_room(need, self._evictable_for(ref)):
            return None
        slot = self._free_slots.pop()
        pages = {}
        for site, number in need.items():
            ids = sorted(self._free_pages[site].pop() for _ in range(number))
            pages[site] = tuple(ids)
        placement = Placement(slot=slot, pages=pages)
        self._residents[ref] = _Resident(placement=placement)
        return placement

    def acquire(self, ref: AdapterRef) -> int:
        """Takes a version that has a place into use; returns its slot."""
        resident = self._residents[ref] = self._residents.pop(ref)  # now the most recently used
        resident.users += 1
        return resident.placement.slot

    def release(self, ref: AdapterRef) -> None:
        """Gives back one `acquire`; the version stays on the device until its room is needed.

        Raises:
          ValueError: nobody uses it.
        """
        if (resident := self._residents.get(ref)) is None or resident.users == 0:
            raise ValueError(f"{ref} is released and nobody uses it")
        resident.users -= 1
        if resident.dropped and resident.users == 0:
            self._evict(ref)

    def drop(self, ref: AdapterRef) -> None:
        """Ends the pin of a version that is gone, and frees its place once nobody uses it."""
        self.unpin(ref)
        if (resident := self._residents.get(ref)) is None:
            return
        resident.dropped = True
        if resident.users == 0:
            self._evict(ref)

    def _left(self, instead_of: AdapterRef | None) -> dict[str, int]:
        """Site -> pages that pinned versions leave."""
        pins = [need for ref, need in self._pinned.items() if ref != instead_of]
        return {
            site: pages - 1 - sum(need.get(site, 0) for need in pins)
            for site, pages in self.pages_of_site.items()
        }

    def _beside(self, instead_of: AdapterRef | None) -> str:
        pins = len(self._pinned.keys() - {instead_of})
        return f" beside {pins} pinned adapters" if pins else ""

    def _rank(self, ref: AdapterRef) -> float:
        return -1 if ref in self._pinned else self._wanted.get(ref, math.inf)

    def _evictable_for(self, newcomer: AdapterRef) -> list[AdapterRef]:
        """Who may make room, in the order in which they go."""
        rank = self._rank(newcomer)
        unused = [ref for ref, resident in self._residents.items() if resident.users == 0]
        evictable = [ref for ref in unused if ref not in self._wanted or self._rank(ref) > rank]
        evictable = [ref for ref in evictable if ref not in self._pinned]
        return sorted(evictable, key=self._rank, reverse=True)

    def _make_room(self, need: Mapping[str, int], evictable: list[AdapterRef]) -> bool:
        """Evicts what it takes for a newcomer, or nothing if that is not enough."""
        if not self._free_slots and not evictable:
            return False
        for site, pages in self._short(need).items():
            if pages > sum(len(self._residents[ref].pages(site)) for ref in evictable):
                return False
        for ref in evictable:
            short = self._short(need)
            if self._free_slots and not short:
                break
            if not self._free_slots or any(self._residents[ref].pages(site) for site in short):
                self._evict(ref)
                self.evictions += 1
                self.on_evict(ref)
        return True

    def _short(self, need: Mapping[str, int]) -> dict[str, int]:
        """Site -> pages that are wanted beyond the free ones, where there are any."""
        missing = {site: pages - len(self._free_pages[site]) for site, pages in need.items()}
        return {site: pages for site, pages in missing.items() if pages > 0}

    def _evict(self, ref: AdapterRef) -> None:
        placement = self._residents.pop(ref).placement
        self._free_slots.append(placement.slot)
        for site, ids in placement.pages.items():
            self._free_pages[site].extend(ids)


def _counted(site: str, pages: int) -> str:
    return "a whole head" if site == REPLACED_HEADS else f"{pages} pages of rank rows"


def _setting_of(site: str) -> str:
    if site == REPLACED_HEADS:
        return "max_replaced_heads"
    return "projector_lora_pages" if site.startswith("projector.") else "lora_pages"
