import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.engine.simulated_device import SimulatedDevice, answer_alone
from valora_jax.engine.kv_blocks import KVBlocks
from valora_jax.engine.request import ImageSpan, Phase, Request
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.engine.scheduler import Scheduler
from valora_jax.errors import OutOfCapacityError, RequestTooLongError
from valora_jax.lora.host_store import AdapterRef

PAGE = 4


def scheduler_of(*, pages: int = 100, prefix_cache: bool = True, **limits) -> Scheduler:
    blocks = KVBlocks(num_pages=pages + 1, page_tokens=PAGE, enable_prefix_cache=prefix_cache)
    defaults = dict(
        max_tokens_per_step=8,
        max_requests=3,
        max_prefill_chunks=8,
        max_waiting=100,
        max_request_tokens=1000,
    )
    return Scheduler(blocks, **defaults | limits)


def request_of(id: str, tokens: int | list[int], max_tokens: int = 4, **fields) -> Request:
    """A number of tokens stands for a prompt that shares nothing with others."""
    if isinstance(tokens, int):
        tokens = [1000 * (sum(map(ord, id)) + 1) + i for i in range(tokens)]
    params = SamplingParams(max_tokens=max_tokens)
    return Request(id=id, prompt_token_ids=tokens, params=params, **fields)


def step(scheduler: Scheduler) -> dict[str, int]:
    """Plans a step and reads its tokens at once; returns the tokens computed by request."""
    plan = scheduler.plan()
    if plan is None:
        return {}
    chunks = plan.decodes + plan.prefills
    for chunk in chunks:
        request = chunk.request
        if chunk.samples and scheduler.append_token(request, 7) and request.outputs_planned:
            scheduler.finish(request, "length")
    return {chunk.request.id: chunk.length for chunk in chunks}


@dataclasses.dataclass
class Places:
    """A gate with a number of places, each shared by all requests of one adapter."""

    places: int
    users: dict = dataclasses.field(default_factory=dict)

    def acquire(self, request: Request) -> bool:
        if request.adapter not in self.users and len(self.users) == self.places:
            return False
        self.users.setdefault(request.adapter, []).append(request)
        return True

    def release(self, request: Request) -> None:
        self.users[request.adapter].remove(request)
        if not self.users[request.adapter]:
            del self.users[request.adapter]


CARS, PLANES = (AdapterRef(name=name, version=i) for i, name in enumerate(["cars", "planes"]))


def test_a_long_prompt_is_chunked_and_never_stalls_a_decode():
    scheduler = scheduler_of()
    scheduler.add(request_of("a", 6), request_of("b", 12))
    assert step(scheduler) == {"a": 6, "b": 2}
    assert step(scheduler) == {"a": 1, "b": 7}
    assert step(scheduler) == {"a": 1, "b": 3}
    assert step(scheduler) == {"a": 1, "b": 1}
    assert step(scheduler) == {"b": 1}


def test_a_chunk_of_one_token_is_a_decode_and_only_the_last_chunk_samples():
    scheduler = scheduler_of(max_tokens_per_step=4)
    scheduler.add(request_of("a", 9))
    shapes = []
    for _ in range(3):
        plan = scheduler.plan()
        shapes.append([(c.start, c.length, c.samples) for c in plan.prefills + plan.decodes])
    assert shapes == [[(0, 4, False)], [(4, 4, False)], [(8, 1, True)]]
    assert len(plan.decodes) == 1
    assert plan.tokens == 1


def test_prefill_chunks_of_a_step_are_bounded():
    scheduler = scheduler_of(max_tokens_per_step=100, max_requests=5, max_prefill_chunks=2)
    scheduler.add(*(request_of(name, 3) for name in "abcde"))
    assert step(scheduler) == {"a": 3, "b": 3}
    assert step(scheduler) == {"a": 1, "b": 1, "c": 3, "d": 3}


def test_steps_are_planned_before_tokens_are_known_and_stop_at_the_limit():
    scheduler = scheduler_of()
    request = request_of("a", 3, max_tokens=3)
    scheduler.add(request)
    starts = []
    while plan := scheduler.plan():
        starts += [chunk.start for chunk in plan.prefills + plan.decodes]
    assert starts == [0, 3, 4]
    assert (request.pending, request.total, request.computed) == (3, 6, 5)
    assert scheduler.has_work
    assert all(scheduler.append_token(request, token) for token in (1, 2, 3))
    scheduler.finish(request, "length")
    assert not scheduler.has_work


def test_a_token_that_comes_after_the_end_is_no_part_of_the_answer():
    scheduler = scheduler_of()
    request = request_of("a", 3)
    scheduler.add(request)
    scheduler.plan()
    scheduler.plan()
    assert scheduler.append_token(request, 1)
    scheduler.finish(request, "stop")
    assert not scheduler.append_token(request, 2)
    assert (request.output_token_ids, request.pending) == ([1], 0)


def test_the_last_admitted_gives_up_its_pages_and_waits_in_front():
    scheduler = scheduler_of(pages=5, max_tokens_per_step=20, prefix_cache=False)
    a, b, c = (request_of(name, 7, max_tokens=9) for name in "abc")
    scheduler.add(a, b, c)
    assert step(scheduler) == {"a": 7, "b": 7}
    assert step(scheduler) == {"a": 1, "b": 1}
    assert step(scheduler) == {"a": 1}  # both need a third page, and one is free
    assert scheduler.running == (a,)
    assert scheduler.waiting == (b, c)
    assert (b.phase, b.pages, b.row, b.computed) == (Phase.WAITING, [], None, 0)
    assert (b.preemptions, scheduler.preemptions, len(b.output_token_ids)) == (1, 1, 2)
    while scheduler.running:
        assert step(scheduler) == {"a": 1}
    assert step(scheduler) == {"b": 9}  # its prompt and both outputs
    assert scheduler.waiting == (c,)


def test_a_plan_is_of_decodes_alone_when_nobody_waits_and_pages_last():
    scheduler = scheduler_of(pages=4, max_tokens_per_step=4)
    a, b = request_of("a", 6, max_tokens=9), request_of("b", 3, max_tokens=1)
    scheduler.add(a)
    assert not scheduler.only_decodes  # it waits
    assert step(scheduler) == {"a": 4}
    assert not scheduler.only_decodes  # its prompt has tokens left
    assert step(scheduler) == {"a": 2}
    assert scheduler.only_decodes
    scheduler.add(b)
    assert not scheduler.only_decodes
    plan = scheduler.plan()
    assert [chunk.request for chunk in plan.decodes + plan.prefills] == [a, b]
    while scheduler.only_decodes:  # all of b is planned
        assert [chunk.request for chunk in scheduler.plan().decodes] == [a]
    assert (a.total, len(a.pages)) == (13, 3)  # the fourth page is b's until its token is read
    assert scheduler.append_token(b, 7)
    scheduler.finish(b, "length")
    assert scheduler.only_decodes


def test_there_is_room_for_who_waits_when_rows_and_pages_last():
    scheduler = scheduler_of(pages=7, max_tokens_per_step=16, max_requests=2)
    assert not scheduler.has_room  # nobody waits
    scheduler.add(request_of("a", 6, max_tokens=9), request_of("b", 8, max_tokens=9))
    assert scheduler.has_room
    step(scheduler)
    scheduler.add(request_of("c", 3, max_tokens=1))
    assert not scheduler.has_room  # no row
    scheduler.finish(scheduler.running[1], "abort")
    assert scheduler.has_room
    scheduler.finish(scheduler.waiting[0], "abort")
    scheduler.add(request_of("d", 17, max_tokens=1))
    assert not scheduler.has_room  # five pages, and one for a, of the five that are free
    scheduler.finish(scheduler.waiting[0], "abort")
    scheduler.add(request_of("e", 16, max_tokens=1))
    assert scheduler.has_room


def test_a_preempted_request_waits_for_its_pending_token():
    scheduler = scheduler_of(pages=5, max_tokens_per_step=20)
    a, b = (request_of(name, 7, max_tokens=9) for name in "ab")
    scheduler.add(a, b)
    plans = [scheduler.plan() for _ in range(3)]
    assert plans[2].preempted == [b]
    assert b.pending == 2
    scheduler.finish(a, "abort")
    assert scheduler.plan() is None
    for token in (1, 2):
        assert scheduler.append_token(b, token)
    assert step(scheduler) == {"b": 5}  # its first page was still cached


def test_samples_of_one_prompt_compute_it_once():
    scheduler = scheduler_of(max_requests=4)
    scheduler.add(*(request_of(name, list(range(14))) for name in "abc"))
    scheduler.add(request_of("d", 2))
    assert step(scheduler) == {"a": 8}
    assert step(scheduler) == {"a": 6, "d": 2}
    assert step(scheduler) == {"a": 1, "d": 1, "b": 2, "c": 2}


def test_a_prompt_that_a_step_can_hold_is_not_cut_to_fill_one_up():
    scheduler = scheduler_of(max_requests=4)
    scheduler.add(request_of("a", 5), request_of("b", 5), request_of("long", 20))
    assert step(scheduler) == {"a": 5}
    assert step(scheduler) == {"a": 1, "b": 5, "long": 2}


def test_a_request_without_a_place_lets_others_pass_a_bounded_number_of_times():
    places = Places(1)
    scheduler = scheduler_of(gates=[places], max_overtaken=3, max_requests=2)
    stuck = request_of("planes", 3, adapter=PLANES)
    names = "abcdefg"
    scheduler.add(request_of("a", 3, max_tokens=30, adapter=CARS), stuck)
    scheduler.add(*(request_of(name, 3, adapter=CARS) for name in names[1:]))
    order = []
    while scheduler.has_work:
        order += [name for name, length in step(scheduler).items() if length == 3]
    assert order == ["a", "b", "c", "d", "planes", "e", "f", "g"]
    assert places.users == {}


def test_a_gate_that_stays_shut_closes_those_before_it_and_changes_nothing():
    first, second = Places(1), Places(0)
    scheduler = scheduler_of(gates=[first, second])
    request = request_of("a", 3)
    scheduler.add(request)
    assert scheduler.plan() is None
    assert first.users == {}
    assert (request.computed, request.pages, request.row) == (0, [], None)
    assert scheduler.has_work
    second.places = 1
    assert step(scheduler) == {"a": 3}


def test_a_gate_sees_what_the_prefix_cache_has():
    seen = []

    class Watch(Places):
        def acquire(self, request):
            seen.append(request.computed)
            return super().acquire(request)

    scheduler = scheduler_of(gates=[Watch(1)])
    for _ in range(2):
        scheduler.add(request_of("a", list(range(6)), max_tokens=1))
        while scheduler.has_work:
            step(scheduler)
    assert seen == [0, 4]


def test_a_large_request_is_not_passed_by_small_ones_for_want_of_pages():
    scheduler = scheduler_of(pages=4, max_tokens_per_step=20)
    scheduler.add(request_of("a", 4), request_of("large", 12), request_of("small", 2))
    assert step(scheduler) == {"a": 4}
    assert step(scheduler) == {"a": 1}


@pytest.mark.parametrize("limits", [dict(max_request_tokens=8), dict(pages=2)], ids=str)
def test_what_can_never_fit_is_refused_and_the_rest_stops_at_the_limit(limits):
    scheduler = scheduler_of(**limits)
    assert scheduler.max_request_tokens == 8
    images = (ImageSpan(content_hash=b"x", start=1, length=5),)
    with pytest.raises(RequestTooLongError, match=r"8 tokens \(5 from images\).* holds 8"):
        scheduler.add(request_of("ok", 3), request_of("a", 8, images=images))
    assert not scheduler.has_work
    request = request_of("b", 7, max_tokens=100)
    scheduler.add(request)
    assert request.output_limit == 1


def test_no_limit_on_tokens_means_the_engines():
    scheduler = scheduler_of(max_request_tokens=50)
    request = request_of("a", 10, max_tokens=None)
    scheduler.add(request)
    assert request.output_limit == 40


def test_a_full_queue_refuses_all_or_none():
    scheduler = scheduler_of(max_waiting=2)
    scheduler.add(request_of("a", 3))
    with pytest.raises(OutOfCapacityError, match="1 requests are waiting and the queue holds 2"):
        scheduler.add(request_of("b", 3), request_of("c", 3))
    assert len(scheduler.waiting) == 1


def test_finishing_in_any_phase_releases_everything():
    places = Places(1)
    scheduler = scheduler_of(gates=[places], max_requests=1)
    running, waiting = request_of("a", 3), request_of("b", 3)
    scheduler.add(running, waiting)
    scheduler.plan()
    for request in (waiting, running, running):
        scheduler.finish(request, "abort")
    scheduler.finish(running, "stop")
    assert running.finish_reason == "abort"
    assert scheduler.finished == {"abort": 2}
    assert (scheduler.has_work, places.users, running.row, running.pages) == (False, {}, None, [])


def test_bad_limits_are_listed_together():
    with pytest.raises(ValueError, match="limits are wrong") as error:
        scheduler_of(max_requests=9, max_prefill_chunks=0, lookahead=0)
    for part in ("max_prefill_chunks=0", "lookahead=0", "max_requests=9 exceeds"):
        assert part in str(error.value)


# Few tokens and prefixes, so that requests share pages; the pool holds little more than one.
PROMPTS = st.builds(
    lambda prefix, tail: [*([1, 2, 3, 1, 2, 3, 1, 2, 3, 1][:prefix]), *tail],
    st.integers(0, 10),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
USABLE_PAGES, MAX_REQUESTS, MAX_TOKENS, MAX_CHUNKS = 6, 4, 7, 2


class RandomTraffic(RuleBasedStateMachine):
    """Requests come, run ahead of what is read, and are aborted at any moment."""

    def __init__(self):
        super().__init__()
        self.blocks = KVBlocks(num_pages=USABLE_PAGES + 1, page_tokens=PAGE)
        self.places = Places(1)
        self.scheduler = Scheduler(
            self.blocks,
            max_tokens_per_step=MAX_TOKENS,
            max_requests=MAX_REQUESTS,
            max_prefill_chunks=MAX_CHUNKS,
            max_waiting=12,
            max_request_tokens=100,
            gates=[self.places],
            max_overtaken=2,
            lookahead=3,
        )
        self.device = SimulatedDevice(self.scheduler, PAGE)
        self.requests: list[Request] = []

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 12),
        adapter=st.sampled_from([None, None, CARS, PLANES]),
        image=st.sampled_from([None, b"cat", b"dog"]),
        logits=st.sampled_from([False, False, False, True]),
        copies=st.integers(1, 3),
    )
    def add(self, prompt, max_tokens, adapter, image, logits, copies):
        spans = (ImageSpan(content_hash=image or b"", start=1, length=5),)
        fields = dict(adapter=adapter, needs_prompt_logits=logits)
        fields |= dict(images=spans if image and len(prompt) >= 6 else ())
        new = [request_of("r", prompt, max_tokens, **fields) for _ in range(copies)]
        try:
            self.scheduler.add(*new)
        except OutOfCapacityError:
            return
        self.requests += new

    @rule(ahead=st.integers(1, 5))
    def run_a_step(self, ahead):
        decoding = [r for r in self.scheduler.running if r.remaining == 1 and not r.outputs_planned]
        only_decodes = self.scheduler.only_decodes
        if (plan := self.scheduler.plan()) is not None:
            assert not (only_decodes and (plan.prefills or plan.preempted))
            assert plan.tokens <= MAX_TOKENS
            assert len(plan.prefills) <= MAX_CHUNKS
            assert {c.request for c in plan.decodes} | {*plan.preempted} >= {*decoding}
            assert all(c.length > 1 for c in plan.prefills)
            self.device.run(plan)
        else:
            assert self.device.unread or not self.scheduler.has_work
        if len(self.device.unread) > (plan is not None) * ahead:
            self.device.read_oldest()

    @rule()
    def read(self):
        if self.device.unread:
            self.device.read_oldest()

    @rule(data=st.data())
    def abort(self, data):
        if self.requests:
            self.scheduler.finish(data.draw(st.sampled_from(self.requests)), "abort")

    @invariant()
    def the_books_balance(self):
        running = self.scheduler.running
        self.blocks.check(running)
        rows = [r.row for r in running]
        assert len({*rows}) == len(rows) <= MAX_REQUESTS
        assert all(0 <= row < MAX_REQUESTS for row in rows)
        assert sum(map(len, self.places.users.values())) == len(running)
        assert all(r.overtaken <= 2 for r in self.requests)
        live = [r for r in self.requests if r.phase is not Phase.FINISHED]
        assert {*live} == {*running, *self.scheduler.waiting}

    def teardown(self):
        for _ in range(100 + 100 * len(self.requests)):
            if not self.scheduler.has_work:
                break
            self.run_a_step(ahead=1)
        while self.device.unread:
            self.device.read_oldest()
        self.the_books_balance()
        assert not self.scheduler.has_work
        assert self.blocks.free_pages == USABLE_PAGES
        assert self.places.users == {}
        for request in self.requests:
            assert (request.pending, request.pages, request.row) == (0, [], None)
            alone = answer_alone(request)
            if request.finish_reason == "abort":
                alone = alone[: len(request.output_token_ids)]
            assert request.output_token_ids == alone


TestRandomTraffic = RandomTraffic.TestCase
TestRandomTraffic.settings = hypothesis.settings(max_examples=150, stateful_step_count=40)
