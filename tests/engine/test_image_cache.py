import hypothesis
import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from valora_jax.engine.image_cache import ImageCache
from valora_jax.engine.request import ImageSpan, Request
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.lora.host_store import AdapterRef

TEXT, TOWER = (AdapterRef(name=name, version=1) for name in ("text", "tower"))


def cache_of(slots: int) -> ImageCache:
    return ImageCache(slots=slots, changes_vision=lambda ref: ref.name == "tower")


def request_of(*images: bytes, adapter=None, computed: int = 0) -> Request:
    """Each image fills ten slots, one after the other."""
    spans = tuple(
        ImageSpan(content_hash=image, start=10 * i, length=10) for i, image in enumerate(images)
    )
    request = Request(
        id="r",
        prompt_token_ids=[0] * (10 * len(images) + 1),
        params=SamplingParams(),
        images=spans,
        adapter=adapter,
    )
    request.computed = computed
    return request


def slots_of_new(cache: ImageCache) -> list[tuple[int, int]]:
    return [(new.slot, new.index) for new in cache.take_new()]


def test_equal_images_share_a_slot_within_and_between_requests():
    cache, a, b = cache_of(3), request_of(b"x", b"y", b"x"), request_of(b"y")
    assert cache.acquire(a)
    assert cache.acquire(b)
    assert cache.slot(a, 0) == cache.slot(a, 2) != cache.slot(a, 1) == cache.slot(b, 0)
    assert slots_of_new(cache) == [(cache.slot(a, 0), 0), (cache.slot(a, 1), 1)]
    assert (cache.held_slots, cache.hits, cache.misses) == (2, 1, 2)


def test_features_are_of_the_adapter_that_changes_the_tower():
    cache = cache_of(3)
    requests = [request_of(b"x", adapter=adapter) for adapter in (None, TEXT, TOWER)]
    assert all(cache.acquire(request) for request in requests)
    base, text, tower = (cache.slot(request, 0) for request in requests)
    assert base == text != tower
    assert len(cache.take_new()) == 2


def test_what_the_prefix_cache_covers_needs_no_slot():
    cache = cache_of(1)
    half, most = request_of(b"x", b"y", computed=9), request_of(b"x", b"y", computed=10)
    assert not cache.acquire(half)
    assert cache.acquire(most)
    assert slots_of_new(cache) == [(cache.slot(most, 1), 1)]


def test_a_full_cache_gives_nothing_and_keeps_nothing():
    cache, a, b = cache_of(2), request_of(b"x"), request_of(b"x", b"y", b"z")
    assert cache.acquire(a)
    cache.take_new()
    assert not cache.acquire(b)
    assert (cache.held_slots, cache.take_new(), cache.misses) == (1, [], 1)
    assert cache.acquire(request_of(b"y"))


def test_the_least_recently_used_features_go_first():
    cache = cache_of(2)
    for image in (b"x", b"y", b"x", b"z"):
        request = request_of(image)
        assert cache.acquire(request)
        cache.take_new()
        cache.release(request)
    for image, is_new in ((b"x", False), (b"z", False), (b"y", True)):
        assert cache.acquire(request_of(image))
        assert bool(cache.take_new()) == is_new
        if not is_new:
            cache.release(next(iter(cache._held)))


def test_features_that_nobody_computed_are_not_found_again():
    cache, request = cache_of(2), request_of(b"x")
    for _ in range(2):
        assert cache.acquire(request)
        cache.release(request)  # it was not admitted after all
        cache.release(request)
        assert cache.take_new() == []
    assert cache.acquire(request)
    assert len(cache.take_new()) == 1


class Traffic(RuleBasedStateMachine):
    """Plans acquire slots for requests; features are computed at the end of each plan."""

    SLOTS = 3

    def __init__(self):
        super().__init__()
        self.cache = cache_of(self.SLOTS)
        self.content: dict[int, tuple] = {}  # slot -> what its features are of
        self.holding: dict[Request, None] = {}  # in order

    @rule(
        wants=st.lists(
            st.tuples(
                st.lists(st.sampled_from([b"u", b"v", b"w", b"x", b"y"]), max_size=4),
                st.sampled_from([None, TEXT, TOWER]),
                st.sampled_from([0, 0, 10, 15]),
            ),
            min_size=1,
            max_size=3,
        ),
        last_stays=st.booleans(),
    )
    def plan(self, wants, last_stays):
        for i, (images, adapter, computed) in enumerate(wants):
            request = request_of(*images, adapter=adapter, computed=computed)
            before = self.held()
            if not self.cache.acquire(request):
                assert self.held() == before
                other = {self.key(request, i) for i in self.needed(request)}
                assert len(other) + self.cache.held_slots > self.SLOTS
                continue
            self.holding[request] = None
            if i == len(wants) - 1 and not last_stays:  # the pages did not suffice
                self.release(request)
        for new in self.cache.take_new():
            assert new.request in self.holding
            self.content[new.slot] = self.key(new.request, new.index)

    @rule(data=st.data(), twice=st.booleans())
    def finish(self, data, twice):
        if self.holding:
            request = data.draw(st.sampled_from(list(self.holding)))
            self.release(request)
            if twice:
                self.cache.release(request)

    @invariant()
    def everybody_has_its_own_features(self):
        for request in self.holding:
            for i in self.needed(request):
                assert self.content[self.cache.slot(request, i)] == self.key(request, i)
        slots = {slot for held in self.held().values() for slot in held.values()}
        assert slots <= set(range(self.SLOTS))
        assert len(slots) == self.cache.held_slots

    def held(self):
        return {
            request: {i: self.cache.slot(request, i) for i in self.needed(request)}
            for request in self.holding
        }

    @staticmethod
    def needed(request: Request) -> list[int]:
        return [i for i, image in enumerate(request.images) if image.end > request.computed]

    @staticmethod
    def key(request: Request, index: int):
        return request.images[index].content_hash, request.adapter == TOWER

    def release(self, request: Request) -> None:
        self.cache.release(request)
        self.holding.pop(request, None)

    def teardown(self):
        for request in list(self.holding):
            self.release(request)
        assert self.cache.held_slots == 0
        assert not self.cache._held


TestTraffic = Traffic.TestCase
TestTraffic.settings = hypothesis.settings(max_examples=150, stateful_step_count=25)
