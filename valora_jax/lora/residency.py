"""Which adapter versions are on the device and where: a slot, and pages of every site they use.

A version in use stays; an unused one stays until its place is needed, least recently used first.
This is the bookkeeping, without arrays: `pool.DevicePool` and `heads.HeadPool` hold those. A whole
replaced head is a page of the site `REPLACED_HEADS`.
"""

import dataclasses
from collections.abc import Mapping

from valora_jax.lora.host_store import AdapterRef

REPLACED_HEADS = "head.replaced"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a version lies on the device.

    Attributes:
      slot: its row in the arrays of scales, biases and task heads.
      pages: site -> page ids in the order of its ranks, which is ascending.
      fresh: nothing is there yet. Whoever gets this must upload the adapter, even if it is
        released at once: later placements of the same version are not fresh.
    """

    slot: int
    pages: Mapping[str, tuple[int, ...]]
    fresh: bool


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class _Resident:
    slot: int
    pages: dict[str, tuple[int, ...]]
    users: int = 0
    dropped: bool = False


class Residency:
    """Hands out slots and pages. Page 0 of every site is zeros and is never handed out."""

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

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref in self._residents

    def slot_of(self, ref: AdapterRef) -> int | None:
        """The slot of a version that is on the device; None for others."""
        return None if (resident := self._residents.get(ref)) is None else resident.slot

    @property
    def in_use(self) -> int:
        """Versions that somebody uses."""
        return sum(resident.users > 0 for resident in self._residents.values())

    def refusals(self, need: Mapping[str, int]) -> list[str]:
        """Why an adapter that needs so many pages can never be placed; empty if it can."""
        return [
            f"{site}: needs {_counted(site, pages)}, the device has "
            f"{max(0, self.pages_of_site.get(site, 0) - 1)}; raise EngineConfig.{_setting_of(site)}"
            for site, pages in need.items()
            if pages > self.pages_of_site.get(site, 0) - 1
        ]

    def acquire(self, ref: AdapterRef, need: Mapping[str, int]) -> Placement | None:
        """Takes a version into use, placing it if it is not there.

        Args:
          ref: the version.
          need: site -> pages, which `refusals` has nothing against.

        Returns:
          Where it lies, or None, with nothing changed, while versions in use take up the room.
        """
        fresh = ref not in self._residents
        if fresh and not self._make_room(need):
            return None
        resident = self._place(need) if fresh else self._residents.pop(ref)
        self._residents[ref] = resident  # at the end: most recently used
        resident.users += 1
        return Placement(slot=resident.slot, pages=resident.pages, fresh=fresh)

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
        """Frees the place of a version that is not wanted any more, once nobody uses it."""
        if (resident := self._residents.get(ref)) is None:
            return
        resident.dropped = True
        if resident.users == 0:
            self._evict(ref)

    def _make_room(self, need: Mapping[str, int]) -> bool:
        """Evicts what it takes for a newcomer, or nothing if that is not enough."""
        unused = [ref for ref, resident in self._residents.items() if resident.users == 0]
        if not self._free_slots and not unused:
            return False
        for site, pages in self._short(need).items():
            if pages > sum(len(self._residents[ref].pages.get(site, ())) for ref in unused):
                return False
        for ref in unused:
            short = self._short(need)
            if self._free_slots and not short:
                break
            if not self._free_slots or short.keys() & self._residents[ref].pages.keys():
                self._evict(ref)
        return True

    def _short(self, need: Mapping[str, int]) -> dict[str, int]:
        """Site -> pages that are wanted beyond the free ones, where there are any."""
        missing = {site: pages - len(self._free_pages[site]) for site, pages in need.items()}
        return {site: pages for site, pages in missing.items() if pages > 0}

    def _place(self, need: Mapping[str, int]) -> _Resident:
        slot = self._free_slots.pop()
        pages = {}
        for site, number in need.items():
            ids = sorted(self._free_pages[site].pop() for _ in range(number))
            pages[site] = tuple(ids)
        return _Resident(slot=slot, pages=pages)

    def _evict(self, ref: AdapterRef) -> None:
        resident = self._residents.pop(ref)
        self._free_slots.append(resident.slot)
        for site, ids in resident.pages.items():
            self._free_pages[site].extend(ids)


def _counted(site: str, pages: int) -> str:
    return "a whole head" if site == REPLACED_HEADS else f"{pages} pages of rank rows"


def _setting_of(site: str) -> str:
    if site == REPLACED_HEADS:
        return "max_replaced_heads"
    return "projector_lora_pages" if site.startswith("projector.") else "lora_pages"
