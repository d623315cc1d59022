import pytest

from valora_jax.engine.request import ImageSpan, Phase, Request
from valora_jax.engine.sampling_params import SamplingParams


def request_of(tokens, **fields) -> Request:
    return Request(id="r", prompt_token_ids=tokens, params=SamplingParams(), **fields)


def test_counts_follow_prompt_outputs_and_pending_tokens():
    request = request_of([5, 6, 7])
    assert (request.known, request.total, request.remaining) == (3, 3, 3)
    request.computed, request.pending = 3, 1
    assert (request.known, request.total, request.remaining) == (3, 4, 1)
    request.output_token_ids.append(8)
    request.pending, request.computed = 0, 4
    assert (request.known, request.total, request.remaining) == (4, 4, 0)
    assert request.phase is Phase.WAITING


def test_images_are_new_until_it_runs_and_again_once_it_lost_its_pages():
    images = tuple(ImageSpan(content_hash=b"i", start=start, length=2) for start in (1, 3))
    request = request_of([5] * 6, images=images)
    for phase, new in ((Phase.WAITING, 2), (Phase.RUNNING, 0), (Phase.WAITING, 2)):
        request.phase = phase
        assert request.new_images == new


@pytest.mark.parametrize("prompt", [[1, 2, 3], (1, 2, 3)], ids=["list", "tuple"])
def test_a_slice_may_span_prompt_and_outputs(prompt):
    request = request_of(prompt)
    request.output_token_ids += [4, 5]
    everything = [1, 2, 3, 4, 5]
    assert request.known_tokens() == everything
    for start in range(6):
        for stop in range(start, 6):
            assert request.known_tokens(start, stop) == everything[start:stop]


@pytest.mark.parametrize("span", [(0, 4), (-1, 2), (3, 2)])
def test_a_slice_of_unknown_tokens_is_refused(span):
    request = request_of([1, 2, 3])
    request.pending = 1
    with pytest.raises(ValueError, match="which knows 3"):
        request.known_tokens(*span)


def test_a_request_equals_itself_only():
    a, b = request_of([1]), request_of([1])
    assert a != b
    assert len({a, b}) == 2


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="'r' has no prompt tokens"):
        request_of([])


@pytest.mark.parametrize("spans", [[(0, 5)], [(-1, 2)], [(2, 1), (0, 1)], [(0, 2), (1, 2)]])
def test_images_out_of_place_are_refused(spans):
    images = tuple(ImageSpan(content_hash=b"x", start=s, length=n) for s, n in spans)
    with pytest.raises(ValueError, match="give spans in order, without overlap, within the prompt"):
        request_of([1, 2, 3, 4], images=images)


def test_images_may_touch():
    spans = tuple(ImageSpan(content_hash=b"x", start=s, length=2) for s in (0, 2))
    assert request_of([1, 2, 3, 4], images=spans).images == spans


def test_repr_stays_short():
    assert len(repr(request_of(list(range(10_000))))) < 1500
