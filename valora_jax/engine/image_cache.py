"""Which images have their features on the device: slots, by content and vision adapter.

A scheduler's gate: a request holds the slots of its images from admission until its prompt is
computed. Features stay in free slots until they are needed for other images.
"""

import collections
import dataclasses
from collections.abc import Callable

from valora_jax.engine.request import Request
from valora_jax.lora.host_store import AdapterRef

# Content hash and, where the adapter changes the tower or projector, its version.
type _Key = tuple[bytes, AdapterRef | None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NewImage:
    """Features to compute into `slot`, for image `index` of `request`."""

    slot: int
    request: Request
    index: int


class ImageCache:
    """Hands out feature slots; least recently used features go first."""

    def __init__(self, *, slots: int, changes_vision: Callable[[AdapterRef], bool]):
        """`changes_vision` tells whether an adapter touches the tower or the projector."""
        self.slots = slots
        self._changes_vision = changes_vision
        self._slot_of: dict[_Key, int] = {}
        self._key_in: dict[int, _Key] = {}  # the inverse
        self._holders: collections.Counter[int] = collections.Counter()
        self._unused = collections.OrderedDict.fromkeys(range(slots))  # oldest first
        self._held: dict[Request, dict[int, int]] = {}  # request -> image index -> slot
        self._new: list[NewImage] = []
        self.hits = 0
        self.misses = 0

    def acquire(self, request: Request) -> bool:
        """Takes a slot for each image that the prefix cache does not cover, or none at all."""
        keys = {
            i: self._key(request, i)
            for i, image in enumerate(request.images)
            if image.end > request.computed
        }
        wanted = set(keys.values())
        known = {key: self._slot_of[key] for key in wanted if key in self._slot_of}
        reusable = len(self._unused) - sum(slot in self._unused for slot in known.values())
        if len(wanted) - len(known) > reusable:
            return False
        for slot in known.values():  # before any eviction, which must not take these
            self._hold(slot)
        held = dict(known)
        for i, key in keys.items():
            if key not in held:
                held[key] = self._evict_for(key)
                self._hold(held[key])
                self._new.append(NewImage(slot=held[key], request=request, index=i))
        self.hits += len(known)
        self.misses += len(wanted) - len(known)
        self._held[request] = {i: held[key] for i, key in keys.items()}
        return True

    def release(self, request: Request) -> None:
        """Gives the slots back; does nothing the second time."""
        # A request that is not admitted after all gives back features that nobody computed.
        for image in [new for new in self._new if new.request is request]:
            self._new.remove(image)
            del self._slot_of[self._key_in.pop(image.slot)]
        for slot in set(self._held.pop(request, {}).values()):
            self._holders[slot] -= 1
            if not self._holders[slot]:
                self._unused[slot] = None

    def slot(self, request: Request, index: int) -> int:
        """The slot that a running request holds for its image."""
        return self._held[request][index]

    def take_new(self) -> list[NewImage]:
        """Images whose features must be computed before the next step."""
        new, self._new = self._new, []
        return new

    @property
    def held_slots(self) -> int:
        return self.slots - len(self._unused)

    def _key(self, request: Request, index: int) -> _Key:
        adapter = request.adapter
        if adapter is not None and not self._changes_vision(adapter):
            adapter = None
        return request.images[index].content_hash, adapter

    def _hold(self, slot: int) -> None:
        self._unused.pop(slot, None)
        self._holders[slot] += 1

    def _evict_for(self, key: _Key) -> int:
        slot, _ = self._unused.popitem(last=False)
        if (old := self._key_in.pop(slot, None)) is not None:
            del self._slot_of[old]
        self._slot_of[key], self._key_in[slot] = slot, key
        return slot
