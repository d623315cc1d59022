import collections

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from valora_jax.lora.host_store import AdapterRef
from valora_jax.lora.residency import REPLACED_HEADS, Placement, Residency

SITES = {"decoder.q": 5, "decoder.v": 4, "projector.up": 3, REPLACED_HEADS: 2}
SLOTS = 3
NUMBERS = st.integers(0, 7)
PAGES = st.tuples(*(st.integers(0, pages - 1) for pages in SITES.values()))


def ref(number: int) -> AdapterRef:
    return AdapterRef(name=f"a{number}", version=number)


def there(residency: Residency) -> list[int]:
    """The numbers of those that have a place."""
    return [i for i in range(9) if ref(i) in residency]


def filled(*numbers: int) -> Residency:
    """Full of unused versions of a slot and a page each; the first were used least lately."""
    residency = Residency(SITES, slots=len(numbers))
    for number in numbers:
        assert residency.place(ref(number), {"decoder.q": 1})
    return residency


def test_a_version_keeps_its_place_while_it_is_used_and_after():
    residency = Residency(SITES, slots=SLOTS)
    assert residency.slot_of(ref(1)) is None
    placement = residency.place(ref(1), {"decoder.q": 2})
    for _ in range(2):
        assert residency.acquire(ref(1)) == placement.slot
    for _ in range(2):
        residency.release(ref(1))
    assert residency.slot_of(ref(1)) == placement.slot


def test_page_zero_is_never_handed_out():
    residency = Residency(SITES, slots=SLOTS)
    assert residency.place(ref(1), {"decoder.q": 4}).pages == {"decoder.q": (1, 2, 3, 4)}


def test_the_least_recently_used_makes_room_and_those_in_use_stay():
    residency = filled(1, 2, 3)
    residency.acquire(ref(3))
    residency.acquire(ref(1))
    residency.release(ref(1))  # 2 is now the least recently used
    evicted = []
    residency.on_evict = evicted.append
    assert residency.place(ref(4), {"decoder.q": 1})
    assert (there(residency), evicted) == ([1, 3, 4], [ref(2)])
    assert residency.resident == (ref(3), ref(1), ref(4))
    assert residency.pages_in_use == dict.fromkeys(SITES, 0) | {"decoder.q": 3}
    residency.drop(ref(1))  # it makes room for nobody
    assert (there(residency), evicted, residency.evictions) == ([3, 4], [ref(2)], 1)


def test_only_versions_whose_pages_are_needed_are_evicted():
    residency = Residency(SITES, slots=3)
    residency.place(ref(1), {"decoder.q": 1})
    residency.place(ref(2), {"decoder.v": 3})
    residency.place(ref(3), {"decoder.v": 2})
    assert there(residency) == [1, 3]


def test_nothing_changes_when_room_is_short():
    residency = Residency(SITES, slots=3)
    residency.place(ref(1), {"decoder.q": 3})
    residency.acquire(ref(1))
    residency.place(ref(2), {"decoder.v": 3})
    assert residency.place(ref(3), {"decoder.v": 1, "decoder.q": 2}) is None
    assert there(residency) == [1, 2]
    assert residency.place(ref(3), {"decoder.v": 3, "decoder.q": 1})


def test_a_dropped_version_goes_when_its_last_user_does():
    residency = Residency(SITES, slots=1)
    residency.place(ref(1), {"decoder.q": 4})
    residency.acquire(ref(1))
    residency.drop(ref(1))
    assert ref(1) in residency
    residency.release(ref(1))
    assert ref(1) not in residency
    residency.drop(ref(1))  # forgotten already
    with pytest.raises(ValueError, match="nobody uses it"):
        residency.release(ref(1))


def test_those_that_nobody_wants_go_before_those_that_are_wanted_later():
    residency = filled(1, 2, 3)
    residency.want([ref(4), ref(1), ref(2), ref(5)])
    residency.place(ref(4), {"decoder.q": 1})
    assert there(residency) == [1, 2, 4]
    residency.want([ref(5), ref(4), ref(1), ref(2)])
    residency.place(ref(5), {"decoder.q": 1})
    assert there(residency) == [1, 4, 5]


def test_those_that_are_wanted_earlier_stay():
    residency = filled(1, 2)
    residency.want([ref(2), ref(3), ref(1)])
    assert residency.place(ref(3), {"decoder.q": 1})  # in the place of 1
    assert residency.place(ref(1), {"decoder.q": 1}) is None
    assert residency.place(ref(4), {"decoder.q": 1}) is None  # nobody waits for it
    residency.want([])
    assert residency.place(ref(4), {"decoder.q": 1})


def test_a_pinned_version_stays_and_comes_before_all_who_wait():
    residency = filled(1, 2)
    residency.want([ref(1), ref(2)])
    residency.pin(ref(3), {"decoder.q": 1})
    assert residency.place(ref(3), {"decoder.q": 1})
    assert there(residency) == [1, 3]
    residency.want([ref(4)])
    residency.place(ref(4), {"decoder.q": 1})
    assert there(residency) == [3, 4]
    residency.unpin(ref(3))
    residency.acquire(ref(4))
    residency.place(ref(1), {"decoder.q": 1})
    assert there(residency) == [1, 4]


def test_a_pin_ends_with_its_version():
    residency = filled(1)
    residency.pin(ref(1), {"decoder.q": 1})
    residency.drop(ref(1))
    assert (residency.pinned, there(residency)) == ((), [])


def test_pins_count_against_what_can_be_placed():
    residency = Residency(SITES, slots=SLOTS)
    residency.pin(ref(1), {"decoder.q": 2})
    need = {"decoder.q": 3}
    assert residency.refusals(need) == [
        "decoder.q: needs 3 pages of rank rows, the device has 2 beside 1 pinned adapters; "
        "raise EngineConfig.lora_pages"
    ]
    assert residency.refusals(need, instead_of=ref(1)) == []


def test_pins_that_leave_too_little_to_others_are_refused():
    residency = Residency(SITES, slots=SLOTS)
    residency.pin(ref(1), {"decoder.q": 1})
    need, others = {"decoder.q": 2}, {"b": {"decoder.q": 2, "decoder.v": 3}, "c": {"decoder.q": 1}}
    assert residency.pin_refusals(need, others) == [
        "decoder.q: adapter 'b' needs 2 pages of rank rows, pinned ones would leave 1; "
        "unpin one or raise EngineConfig.lora_pages"
    ]
    assert residency.pin_refusals(need, others, instead_of=ref(1)) == []
    residency.pin(ref(2), {})
    assert residency.pin_refusals({}, {}) == [
        "3 pinned adapters would take all 3 slots; unpin one or raise EngineConfig.max_adapters"
    ]


def test_an_adapter_that_can_never_fit_names_every_site_and_setting():
    residency = Residency(SITES, slots=SLOTS)
    need = {"decoder.q": 5, "decoder.v": 3, "projector.up": 64, REPLACED_HEADS: 2}
    assert residency.refusals(need) == [
        "decoder.q: needs 5 pages of rank rows, the device has 4; raise EngineConfig.lora_pages",
        "projector.up: needs 64 pages of rank rows, the device has 2; "
        "raise EngineConfig.projector_lora_pages",
        "head.replaced: needs a whole head, the device has 1; "
        "raise EngineConfig.max_replaced_heads",
    ]
    (unserved,) = Residency({}, slots=1).refusals({"vision.q": 1})
    assert "vision.q: needs 1 pages of rank rows, the device has 0" in unserved


def test_pages_are_in_the_order_of_ranks():
    # The sum over a version's ranks then has one order wherever it lies.
    residency = Residency(SITES, slots=SLOTS)
    for number in (1, 2):
        residency.place(ref(number), {"decoder.q": 2})
    pages = residency.place(ref(3), {"decoder.q": 4}).pages["decoder.q"]
    assert list(pages) == sorted(pages)


class Machine(RuleBasedStateMachine):
    """Against a model that knows who is where: no page twice, no leak, nobody goes too early."""

    def __init__(self):
        super().__init__()
        self.residency = Residency(SITES, slots=SLOTS)
        self.needs: dict[AdapterRef, dict[str, int]] = {}
        self.places: dict[AdapterRef, Placement] = {}
        self.users: collections.Counter[AdapterRef] = collections.Counter()
        self.wanted: list[AdapterRef] = []
        self.pins: set[AdapterRef] = set()

    def need(self, chosen: AdapterRef, pages: tuple[int, ...]) -> dict[str, int]:
        need = {site: n for site, n in zip(SITES, pages, strict=True) if n}
        return self.needs.setdefault(chosen, need)

    def must_stay(self, newcomer: AdapterRef) -> set[AdapterRef]:
        """Who has a place that the newcomer may not have."""
        earlier = self.wanted
        if newcomer in self.pins:
            earlier = []
        elif newcomer in self.wanted:
            earlier = self.wanted[: self.wanted.index(newcomer)]
        return {r for r in self.places if self.users[r] or r in self.pins or r in earlier}

    @rule(number=NUMBERS, pages=PAGES)
    def use(self, number, pages):
        chosen, need = ref(number), self.need(ref(number), pages)
        if chosen not in self.places:
            if self.residency.refusals(need):
                return
            stay = self.must_stay(chosen)
            placement = self.residency.place(chosen, need)
            taken = [self.needs[other] for other in stay]
            room = all(n + sum(o.get(s, 0) for o in taken) < SITES[s] for s, n in need.items())
            assert (placement is not None) == (room and len(stay) < SLOTS)
            if placement is None:
                return
            assert {site: len(ids) for site, ids in placement.pages.items()} == need
            gone = {other for other in self.places if other not in self.residency}
            assert not gone & stay
            for other in gone:
                del self.places[other]
            self.places[chosen] = placement
        assert self.residency.acquire(chosen) == self.places[chosen].slot
        self.users[chosen] += 1

    @precondition(lambda self: self.users.total())
    @rule(data=st.data())
    def release(self, data):
        chosen = data.draw(st.sampled_from(sorted(self.users.elements(), key=str)))
        self.residency.release(chosen)
        self.users[chosen] -= 1

    @rule(numbers=st.lists(NUMBERS, unique=True))
    def want(self, numbers):
        self.wanted = [ref(number) for number in numbers]
        self.residency.want(self.wanted)

    @rule(number=NUMBERS, pages=PAGES)
    def pin(self, number, pages):
        chosen, need = ref(number), self.need(ref(number), pages)
        if not self.residency.refusals(need) and not self.residency.pin_refusals(need, {}):
            self.residency.pin(chosen, need)
            self.pins.add(chosen)

    @rule(number=NUMBERS)
    def unpin(self, number):
        self.residency.unpin(ref(number))
        self.pins.discard(ref(number))

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def drop(self, data):
        chosen = data.draw(st.sampled_from(sorted(self.places, key=str)))
        self.pins.discard(chosen)
        self.residency.drop(chosen)
        while self.users[chosen]:
            assert chosen in self.residency
            self.residency.release(chosen)
            self.users[chosen] -= 1
        assert chosen not in self.residency
        del self.places[chosen]

    @invariant()
    def the_books_agree(self):
        assert {r for r in map(ref, range(8)) if r in self.residency} == self.places.keys()
        assert self.residency.in_use == sum(users > 0 for users in self.users.values())
        assert set(self.residency.pinned) == self.pins
        assert len({p.slot for p in self.places.values()}) == len(self.places)
        for chosen, placement in self.places.items():
            assert self.residency.slot_of(chosen) == placement.slot
        for site in SITES:
            pages = [page for p in self.places.values() for page in p.pages.get(site, ())]
            assert len(set(pages)) == len(pages)
            assert all(0 < page < SITES[site] for page in pages)

    def teardown(self):
        for chosen in self.users.elements():
            self.residency.release(chosen)
        for chosen in self.pins:
            self.residency.unpin(chosen)
        self.residency.want([])
        everything = {site: pages - 1 for site, pages in SITES.items()}
        assert self.residency.place(ref(99), everything) is not None


TestMachine = Machine.TestCase
