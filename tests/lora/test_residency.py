import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from valora_jax.lora.host_store import AdapterRef
from valora_jax.lora.residency import REPLACED_HEADS, Placement, Residency

SITES = {"decoder.q": 5, "decoder.v": 4, "projector.up": 3, REPLACED_HEADS: 2}
SLOTS = 3


def ref(number: int) -> AdapterRef:
    return AdapterRef(name=f"a{number}", version=number)


def test_a_version_is_fresh_once_and_keeps_its_place():
    residency = Residency(SITES, slots=SLOTS)
    first = residency.acquire(ref(1), {"decoder.q": 2})
    again = residency.acquire(ref(1), {"decoder.q": 2})
    assert (first.fresh, again.fresh) == (True, False)
    assert (first.slot, first.pages) == (again.slot, again.pages)
    residency.release(ref(1))
    residency.release(ref(1))
    assert not residency.acquire(ref(1), {"decoder.q": 2}).fresh


def test_page_zero_is_never_handed_out():
    residency = Residency(SITES, slots=SLOTS)
    assert residency.acquire(ref(1), {"decoder.q": 4}).pages == {"decoder.q": (1, 2, 3, 4)}


def test_the_least_recently_used_makes_room_and_those_in_use_stay():
    residency = Residency(SITES, slots=3)
    for i in (1, 2, 3):
        residency.acquire(ref(i), {"decoder.q": 1})
    residency.release(ref(2))
    residency.release(ref(1))
    residency.acquire(ref(2), {"decoder.q": 1})
    residency.release(ref(2))  # 1 is now the least recently used, 3 is in use
    assert residency.acquire(ref(4), {"decoder.q": 1}).fresh
    assert [i for i in (1, 2, 3, 4) if ref(i) in residency] == [2, 3, 4]


def test_only_versions_whose_pages_are_wanted_are_evicted():
    residency = Residency(SITES, slots=3)
    residency.acquire(ref(1), {"decoder.q": 1})
    residency.acquire(ref(2), {"decoder.v": 3})
    for i in (1, 2):
        residency.release(ref(i))
    residency.acquire(ref(3), {"decoder.v": 2})
    assert ref(1) in residency
    assert ref(2) not in residency


def test_nothing_changes_when_room_is_short():
    residency = Residency(SITES, slots=3)
    residency.acquire(ref(1), {"decoder.q": 3})
    residency.acquire(ref(2), {"decoder.v": 3})
    residency.release(ref(2))
    assert residency.acquire(ref(3), {"decoder.v": 1, "decoder.q": 2}) is None
    assert ref(2) in residency
    assert residency.acquire(ref(3), {"decoder.v": 3, "decoder.q": 1}).fresh


def test_a_dropped_version_goes_when_its_last_user_does():
    residency = Residency(SITES, slots=1)
    residency.acquire(ref(1), {"decoder.q": 4})
    residency.drop(ref(1))
    assert ref(1) in residency
    residency.release(ref(1))
    assert ref(1) not in residency
    residency.drop(ref(1))  # forgotten already
    with pytest.raises(ValueError, match="nobody uses it"):
        residency.release(ref(1))


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
        residency.acquire(ref(number), {"decoder.q": 2})
        residency.release(ref(number))
    pages = residency.acquire(ref(3), {"decoder.q": 4}).pages["decoder.q"]
    assert list(pages) == sorted(pages)


class Machine(RuleBasedStateMachine):
    """Against a model that knows only what is in use: no page twice, no leak."""

    def __init__(self):
        super().__init__()
        self.residency = Residency(SITES, slots=SLOTS)
        self.needs: dict[AdapterRef, dict[str, int]] = {}
        self.used: dict[AdapterRef, tuple[Placement, int]] = {}

    @rule(
        number=st.integers(0, 7), pages=st.tuples(*(st.integers(0, n - 1) for n in SITES.values()))
    )
    def acquire(self, number, pages):
        need = dict(zip(SITES, pages, strict=True))
        need = self.needs.setdefault(ref(number), {s: n for s, n in need.items() if n})
        was_there = ref(number) in self.residency
        placement = self.residency.acquire(ref(number), need)
        others = [self.needs[r] for r in self.used if r != ref(number)]
        room = all(n + sum(o.get(s, 0) for o in others) < SITES[s] for s, n in need.items())
        assert (placement is not None) == (was_there or (room and len(others) < SLOTS))
        if placement:
            assert placement.fresh != was_there
            assert {s: len(ids) for s, ids in placement.pages.items()} == need
            _, users = self.used.get(ref(number), (None, 0))
            self.used[ref(number)] = placement, users + 1

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def release(self, data):
        chosen = data.draw(st.sampled_from(list(self.used)))
        placement, users = self.used.pop(chosen)
        self.residency.release(chosen)
        if users > 1:
            self.used[chosen] = placement, users - 1

    @rule(number=st.integers(0, 7))
    def drop(self, number):
        self.residency.drop(ref(number))
        assert (ref(number) in self.residency) == (ref(number) in self.used)

    @invariant()
    def the_books_agree(self):
        placements = [placement for placement, _ in self.used.values()]
        assert self.residency.in_use == len(placements)
        assert len({p.slot for p in placements}) == len(placements)
        for site in SITES:
            pages = [page for p in placements for page in p.pages.get(site, ())]
            assert len(set(pages)) == len(pages)
            assert all(0 < page < SITES[site] for page in pages)

    def teardown(self):
        for chosen, (_, users) in self.used.items():
            for _ in range(users):
                self.residency.release(chosen)
        everything = {site: pages - 1 for site, pages in SITES.items()}
        assert self.residency.acquire(ref(99), everything) is not None


TestMachine = Machine.TestCase
