import hypothesis
import hypothesis.strategies as st
import pytest

from valora_jax.engine.buckets import Buckets, default_step_tokens

SIZES = st.fixed_dictionaries(
    dict(
        max_requests=st.integers(1, 300),
        max_tokens_per_step=st.integers(1, 2048),
        tokens_per_image=st.sampled_from([1, 16, 64, 576]),
        spacing=st.sampled_from(["coarse", "fine"]),
    )
).filter(lambda sizes: sizes["max_requests"] <= sizes["max_tokens_per_step"])


@hypothesis.given(sizes=SIZES, data=st.data())
def test_every_step_that_can_be_planned_has_a_shape_that_holds_it(sizes, data):
    buckets = Buckets(**sizes)
    decodes = data.draw(st.integers(0, sizes["max_requests"]))
    room = sizes["max_tokens_per_step"] - decodes
    prompt_tokens = data.draw(st.integers(0 if decodes else 1, room))
    bucket = buckets.choose(decodes=decodes, prompt_tokens=prompt_tokens)
    assert bucket in list(buckets)
    assert decodes <= bucket.decodes <= bucket.tokens
    assert decodes + prompt_tokens <= bucket.tokens <= sizes["max_tokens_per_step"]
    assert bucket.rows >= min(sizes["max_requests"], bucket.tokens)
    assert bool(bucket.chunks) == (prompt_tokens > 0)


@hypothesis.given(sizes=SIZES)
def test_shapes_are_few_all_different_and_within_the_limits(sizes):
    buckets = list(Buckets(**sizes))
    assert len(buckets) == len(set(buckets)) <= (8 if sizes["spacing"] == "coarse" else 26)
    assert max(bucket.tokens for bucket in buckets) == sizes["max_tokens_per_step"]
    assert max(bucket.decodes for bucket in buckets) == sizes["max_requests"]


@pytest.mark.parametrize("spacing", ["coarse", "fine"])
def test_a_prompt_of_one_image_and_a_short_text_is_padded_little(spacing):
    buckets = Buckets(
        max_requests=16, max_tokens_per_step=2048, tokens_per_image=576, spacing=spacing
    )
    assert buckets.choose(decodes=4, prompt_tokens=600).tokens <= 1.1 * 604
    assert buckets.choose(decodes=4, prompt_tokens=20).tokens <= 64


@pytest.mark.parametrize("tokens", range(257, 2049, 64))
def test_fine_sizes_pad_little_everywhere(tokens):
    buckets = Buckets(
        max_requests=64, max_tokens_per_step=2048, tokens_per_image=576, spacing="fine"
    )
    padded = buckets.choose(decodes=0, prompt_tokens=tokens).tokens - tokens
    assert padded < max(128, tokens / 4)


def test_the_largest_step_holds_two_such_prompts_by_default():
    tokens = default_step_tokens(max_requests=16, tokens_per_image=576)
    assert 2 * 620 + 16 <= tokens <= 2 * 640
    assert default_step_tokens(max_requests=500, tokens_per_image=16) == 500
