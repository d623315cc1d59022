import hypothesis
import hypothesis.strategies as st
import pytest

from valora_jax.engine.kv_blocks import SCRATCH_PAGE, KVBlocks
from valora_jax.engine.request import ImageSpan, Request
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.lora.host_store import AdapterRef

PAGE = 4


def blocks_of(usable: int, **options) -> KVBlocks:
    return KVBlocks(num_pages=usable + 1, page_tokens=PAGE, **options)


def request_of(tokens, **fields) -> Request:
    return Request(id="r", prompt_token_ids=list(tokens), params=SamplingParams(), **fields)


def admit(blocks: KVBlocks, request: Request) -> bool:
    request.computed = blocks.match(request)
    return blocks.admit(request)


def run(blocks: KVBlocks, request: Request) -> Request:
    """Admits a request and computes all its tokens."""
    assert admit(blocks, request)
    request.computed = request.total
    blocks.commit(request)
    return request


def run_and_free(blocks: KVBlocks, request: Request) -> Request:
    run(blocks, request)
    blocks.free(request)
    return request


def test_pages_are_handed_out_whole_or_not_at_all():
    blocks, request, other = blocks_of(3), request_of(range(6)), request_of(range(10, 20))
    assert admit(blocks, request)
    assert len(request.pages) == 2
    assert not admit(blocks, other)
    assert other.pages == []
    assert blocks.allocate(request, 8)
    assert blocks.allocate(request, 9)
    assert not blocks.allocate(request, 13)
    assert len(request.pages) == 3
    assert SCRATCH_PAGE not in request.pages
    blocks.check([request])
    blocks.free(request)
    assert blocks.free_pages == blocks.usable_pages == 3
    blocks.check([])


def test_a_reserve_stays_free():
    blocks, request = blocks_of(3), request_of(range(8))
    assert not blocks.admit(request, reserve_pages=2)
    assert blocks.admit(request, reserve_pages=1)


def test_the_same_prompt_is_found_but_for_its_last_token():
    blocks = blocks_of(10)
    first = run_and_free(blocks, request_of(range(8)))
    assert first.cached_tokens == 0
    assert blocks.match(request_of(range(8))) == 4
    assert blocks.match(request_of(range(9))) == 8
    assert blocks.match(request_of(range(4))) == 0
    assert blocks.match(request_of([0, 1, 2, 3, 9, 9, 9, 9, 9])) == 4
    assert blocks.match(request_of([9, 1, 2, 3, 4, 5, 6, 7, 8])) == 0


def test_pages_are_shared_while_both_run():
    blocks = blocks_of(4)
    a, b = run(blocks, request_of(range(9))), request_of(range(10))
    assert admit(blocks, b)
    assert a.pages[:2] == b.pages[:2]
    assert a.pages[2] != b.pages[2]
    assert (b.computed, b.cached_tokens, blocks.free_pages) == (8, 8, 0)
    blocks.check([a, b])
    blocks.free(a)
    blocks.check([b])
    blocks.free(b)
    blocks.check([])
    assert (blocks.queried_tokens, blocks.hit_tokens) == (19, 8)


def image_at(start: int, content: bytes) -> tuple[ImageSpan]:
    return (ImageSpan(content_hash=content, start=start, length=6),)


BASE = dict(adapter=AdapterRef(name="cars", version=1), images=image_at(1, b"cat"))
OTHERS = {
    "base_model": BASE | dict(adapter=None),
    "adapter": BASE | dict(adapter=AdapterRef(name="planes", version=1)),
    "version": BASE | dict(adapter=AdapterRef(name="cars", version=2)),
    "image": BASE | dict(images=image_at(1, b"dog")),
    "image_position": BASE | dict(images=image_at(2, b"cat")),
    "no_image": BASE | dict(images=()),
    "salt": BASE | dict(cache_salt=b"tenant"),
}


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS.keys())
def test_what_differs_is_not_shared(fields):
    blocks = blocks_of(10)
    run_and_free(blocks, request_of([7] * 9, **BASE))
    assert blocks.match(request_of([7] * 9, **BASE)) == 8
    assert blocks.match(request_of([7] * 9, **fields)) == 0


def test_text_before_a_different_image_is_shared():
    blocks = blocks_of(10)
    run_and_free(blocks, request_of([7] * 13, images=image_at(5, b"cat")))
    assert blocks.match(request_of([7] * 13, images=image_at(5, b"dog"))) == 4


def test_an_image_is_part_of_the_pages_that_it_overlaps():
    blocks = blocks_of(10)
    cat, dog = image_at(2, b"cat"), image_at(12, b"dog")
    run_and_free(blocks, request_of([7] * 19, images=cat))
    assert blocks.match(request_of([7] * 19, images=cat)) == 16
    assert blocks.match(request_of([7] * 19, images=(*cat, *dog))) == 12


def test_prompts_whose_logits_are_wanted_are_computed_whole_but_shared_with_others():
    blocks = blocks_of(10)
    run_and_free(blocks, request_of(range(9), needs_prompt_logits=True))
    assert blocks.match(request_of(range(9), needs_prompt_logits=True)) == 0
    assert blocks.match(request_of(range(9))) == 8


def test_answers_are_shared_as_far_as_they_are_known():
    blocks = blocks_of(10)
    request = run(blocks, request_of(range(6)))
    request.output_token_ids += [6]
    request.pending, request.computed = 2, 8
    blocks.commit(request)
    assert blocks.match(request_of(range(9))) == 4  # the value of token 7 is unknown
    request.output_token_ids += [7]
    request.pending = 1
    blocks.commit(request)
    assert blocks.match(request_of(range(9))) == 8


def test_only_computed_pages_are_found():
    blocks, request = blocks_of(10), request_of(range(12))
    assert admit(blocks, request)
    request.computed = 7
    blocks.commit(request)
    assert blocks.match(request_of(range(12))) == 4


def test_blank_pages_go_first_then_the_least_recently_used_prefix_from_its_end():
    blocks = blocks_of(5)
    run_and_free(blocks, request_of(range(8)))
    run_and_free(blocks, request_of(range(100, 108)))
    old, recent = request_of(range(9)), request_of(range(100, 109))
    assert (blocks.match(old), blocks.match(recent)) == (8, 8)
    taker = request_of(range(50, 53))
    assert admit(blocks, taker)
    assert (blocks.match(old), blocks.match(recent)) == (8, 8)
    assert blocks.allocate(taker, 5)
    assert (blocks.match(old), blocks.match(recent)) == (4, 8)
    assert blocks.allocate(taker, 13)
    assert (blocks.match(old), blocks.match(recent)) == (0, 4)
    blocks.check([taker])


def test_a_hit_makes_a_prefix_recent():
    blocks = blocks_of(4)
    run_and_free(blocks, request_of(range(4)))
    run_and_free(blocks, request_of(range(100, 104)))
    run_and_free(blocks, request_of(range(5)))
    taker = request_of(range(50, 61))
    assert admit(blocks, taker)
    assert blocks.match(request_of(range(5))) == 4
    assert blocks.match(request_of(range(100, 105))) == 0


def test_matched_pages_do_not_count_as_free():
    blocks = blocks_of(3)
    run_and_free(blocks, request_of(range(8)))
    longer = request_of(range(13))
    longer.computed = blocks.match(longer)
    assert longer.computed == 8
    assert not blocks.admit(longer)
    blocks.check([])
    assert blocks.match(longer) == 8


def test_a_page_being_computed_is_awaited_until_it_is_committed_or_given_up():
    blocks = blocks_of(20)
    owner, same, other = request_of(range(12)), request_of(range(12)), request_of(range(20, 32))
    assert not blocks.awaits(same, blocks.match(same))
    assert admit(blocks, owner)
    assert blocks.awaits(same, blocks.match(same))
    assert not blocks.awaits(other, blocks.match(other))
    owner.computed = 4
    blocks.commit(owner)
    assert blocks.awaits(same, blocks.match(same))
    owner.computed = 8
    blocks.commit(owner)
    # The last page is computed by each, to sample from its last token.
    assert blocks.match(same) == 8
    assert not blocks.awaits(same, 8)
    longer = request_of(range(14))
    assert blocks.awaits(longer, blocks.match(longer))
    blocks.free(owner)
    assert not blocks.awaits(longer, blocks.match(longer))


def test_content_computed_twice_has_one_home():
    blocks = blocks_of(10)
    a, b = request_of(range(9)), request_of(range(9))
    assert admit(blocks, a)
    assert admit(blocks, b)
    for request in (a, b):
        request.computed = 9
        blocks.commit(request)
    blocks.check([a, b])
    third = run(blocks, request_of(range(9)))
    assert third.pages[:2] == a.pages[:2]
    for request in (a, b, third):
        blocks.free(request)
    blocks.check([])


def test_without_a_prefix_cache_nothing_is_found():
    blocks = blocks_of(10, enable_prefix_cache=False)
    run_and_free(blocks, request_of(range(9)))
    again = request_of(range(9))
    assert blocks.match(again) == 0
    assert not blocks.awaits(again, 0)
    assert again.page_digests == []
    blocks.check([])


def test_a_second_admission_is_not_counted_as_a_query():
    blocks = blocks_of(10)
    request = run_and_free(blocks, request_of(range(9)))
    request.preemptions, request.computed = 1, blocks.match(request)
    assert blocks.admit(request)
    assert (request.computed, request.cached_tokens) == (8, 0)
    assert (blocks.queried_tokens, blocks.hit_tokens) == (9, 0)


def test_check_reports_a_leak():
    blocks, request = blocks_of(3), request_of(range(4))
    assert admit(blocks, request)
    with pytest.raises(AssertionError, match="0 requests hold it, 1 are counted"):
        blocks.check([])


@pytest.mark.parametrize(("num_pages", "page_tokens"), [(1, 16), (10, 0)])
def test_a_pool_without_room_is_refused(num_pages, page_tokens):
    with pytest.raises(ValueError, match="want at least 2 pages"):
        KVBlocks(num_pages=num_pages, page_tokens=page_tokens)


@hypothesis.given(
    st.lists(
        st.tuples(
            st.sampled_from(["admit", "grow", "compute", "free"]),
            st.integers(0, 5),
            st.lists(st.integers(0, 1), min_size=1, max_size=14),
        ),
        max_size=60,
    )
)
def test_the_books_balance_whatever_happens(operations):
    blocks = blocks_of(7)
    held: dict[int, Request] = {}
    for operation, slot, tokens in operations:
        if operation == "admit" and slot not in held:
            request = request_of(tokens)
            if admit(blocks, request):
                held[slot] = request
        elif slot in held:
            request = held[slot]
            if operation == "grow" and blocks.allocate(request, request.known + len(tokens)):
                request.output_token_ids += tokens
            elif operation == "compute":
                request.computed = min(request.known, request.computed + len(tokens))
                blocks.commit(request)
            elif operation == "free":
                blocks.free(held.pop(slot))
        blocks.check(held.values())
