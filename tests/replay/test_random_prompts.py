import pytest

from tests.engine.engines import engine_of
from valora_jax.replay.arrivals import Arrival
from valora_jax.replay.random_prompts import RandomPrompts


def prompts(*, seed: int = 0) -> RandomPrompts:
    return RandomPrompts(engine_of().parts, seed=seed)


def arrival(*, text: int, images: int = 0, output: int = 5) -> Arrival:
    image_tokens = engine_of().parts.spec.tokens_per_image
    return Arrival(
        at_s=0.0,
        adapter=None,
        prompt_tokens=images * image_tokens + text,
        output_tokens=output,
        images=images,
    )


def test_a_prompt_is_as_long_as_the_trace_says():
    spec = engine_of().parts.spec
    checked = prompts().make(arrival(text=200, images=2))
    ids, n = checked.processed.token_ids, spec.tokens_per_image
    assert len(ids) == 2 * n + 200
    assert set(ids[: 2 * n]) == {spec.image_token_id}
    assert spec.image_token_id not in ids[2 * n :]
    assert all(0 <= token < spec.vocab_rows for token in ids)
    assert [(i.start, i.length) for i in checked.processed.images] == [(0, n), (n, n)]
    assert checked.processed.images[0].pixels_CHW.shape == spec.pixel_shape


def test_an_answer_ends_by_length_alone():
    params = prompts().make(arrival(text=9, output=33)).params
    assert (params.max_tokens, params.ignore_eos, params.greedy) == (33, True, True)


def test_no_two_images_are_the_same_to_a_cache():
    source = prompts()
    images = [i for _ in range(20) for i in source.make(arrival(text=1, images=2)).processed.images]
    assert len({image.content_hash for image in images}) == 40


def test_a_seed_gives_the_same_prompts():
    one, same, other = (prompts(seed=s).make(arrival(text=50)).processed for s in (1, 1, 2))
    assert one.token_ids == same.token_ids != other.token_ids


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(text=600), "has 605 tokens, the engine takes 512; raise --engine.max-req"),
        (dict(text=0, images=1), "no room for 1 images of"),
        (dict(text=9, images=9), "has 9 images, the engine holds 4 at once"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        prompts().make(arrival(**wrong))
