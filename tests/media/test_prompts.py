import json
import pathlib

import numpy as np
import pytest

from valora_jax.errors import ImageError
from valora_jax.media import ClipPixels, ImageLimits, Tokenizer, load_image, process_prompt

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
CHECKPOINT = GOLDENS / "checkpoints" / "llava15-tiny"
IMAGES = GOLDENS / "text" / "images"
CASES = json.loads((GOLDENS / "text" / "text_cases.json").read_text("utf-8"))["tokenizer"]
TOKENIZER = Tokenizer.from_folder(CHECKPOINT)
PIXELS = ClipPixels.from_folder(CHECKPOINT)
IMAGE, SLOTS = 672, 16
A, B = IMAGES / "a_wide.png", IMAGES / "b_tall.png"


def process(prompt, **options):
    options = dict(tokenizer=TOKENIZER, pixels=PIXELS, vocab_size=704) | options
    slots = dict(image_token="<image>", image_token_id=IMAGE, tokens_per_image=SLOTS)
    return process_prompt(prompt, **slots, **options)


def with_images(prompt, *images):
    key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
    return {key: prompt, "multi_modal_data": {"image": list(images)}}


@pytest.mark.parametrize("case", [c for c in CASES if c["text"]], ids=lambda c: c["text"])
def test_expanding_ids_equals_expanding_the_text(case):
    text = case["text"]
    got = process(with_images(text, *[A] * text.count("<image>")))
    assert list(got.token_ids) == TOKENIZER.encode(text.replace("<image>", "<image>" * SLOTS))


def test_each_image_fills_its_own_slots():
    got = process(with_images("<image><image> and <image>", A, B, A))
    assert [image.length for image in got.images] == [SLOTS] * 3
    for image in got.images:
        assert set(got.token_ids[image.start : image.start + image.length]) == {IMAGE}
    assert [image.start for image in got.images][:2] == [1, 1 + SLOTS]
    assert got.token_ids[got.images[2].start - 1] != IMAGE
    first, second, third = got.images
    np.testing.assert_array_equal(second.pixels_CHW, PIXELS(load_image(B)))
    assert first.content_hash == third.content_hash != second.content_hash


def test_a_text_and_one_image_need_no_ceremony():
    assert process("Hello world").token_ids == tuple(TOKENIZER.encode("Hello world"))
    prompt = {"prompt": "<image> x", "multi_modal_data": {"image": A}}
    assert len(process(prompt).images) == 1


def test_a_text_may_name_the_other_kind_of_prompt():
    assert process("prompt_token_ids").images == ()


@pytest.mark.parametrize("ids", [[1, IMAGE, 13, IMAGE], np.array([1, IMAGE, 13, IMAGE])], ids=type)
def test_token_ids_may_hold_one_placeholder_an_image_or_be_expanded(ids):
    short = process(with_images(ids, A, B))
    assert short.token_ids == (1, *[IMAGE] * SLOTS, 13, *[IMAGE] * SLOTS)
    assert all(type(token) is int for token in short.token_ids)
    expanded = process(with_images(list(short.token_ids), A, B))
    assert expanded.token_ids == short.token_ids
    assert [i.start for i in expanded.images] == [i.start for i in short.images] == [1, 2 + SLOTS]


def test_an_expanded_run_may_hold_several_images():
    got = process(with_images([1, *[IMAGE] * 2 * SLOTS], A, B))
    assert [image.start for image in got.images] == [1, 1 + SLOTS]


def test_ready_pixel_values_are_taken_as_they_are():
    values = np.stack([PIXELS(load_image(path)) for path in (A, B)])
    got = process(
        {"prompt_token_ids": [IMAGE, IMAGE], "multi_modal_data": {"pixel_values": values}}
    )
    np.testing.assert_array_equal(np.stack([image.pixels_CHW for image in got.images]), values)
    assert got.images[0].content_hash != got.images[1].content_hash


MISCOUNTED = {
    "no_image": ("<image> x", 1, 0),
    "no_placeholder": ("x", 0, 1),
    "one_too_many": ("<image><image> x", 2, 1),
    "text_expanded_by_hand": ("<image>" * SLOTS, SLOTS, 1),
    "ids": ([1, IMAGE, IMAGE, IMAGE], 3, 2),
    "expanded_ids": ([1, *[IMAGE] * 2 * SLOTS], 2, 1),
    "ragged_run": ([1, *[IMAGE] * (SLOTS + 1)], SLOTS + 1, 1),
}


@pytest.mark.parametrize(
    ("prompt", "placeholders", "n"), MISCOUNTED.values(), ids=MISCOUNTED.keys()
)
def test_a_wrong_count_names_both_numbers(prompt, placeholders, n):
    with pytest.raises(ValueError, match=rf"{placeholders} image placeholders .* and {n} images"):
        process(with_images(prompt, *[A] * n))


BAD = {
    "nothing": {},
    "both": {"prompt": "x", "prompt_token_ids": [1]},
    "unknown_key": {"prompt": "x", "images": []},
    "number": 3,
    "prompt_number": {"prompt": 3},
    "no_tokens": {"prompt_token_ids": []},
    "negative": {"prompt_token_ids": [1, -1]},
    "too_large": {"prompt_token_ids": [704]},
    "float": {"prompt_token_ids": [1.0]},
    "bool": {"prompt_token_ids": [True]},
    "ids_as_text": {"prompt_token_ids": "12"},
    "data_as_list": {"prompt": "x", "multi_modal_data": [A]},
    "video": {"prompt": "x", "multi_modal_data": {"video": A}},
    "pixels_of_another_size": {
        "prompt": "<image>",
        "multi_modal_data": {"pixel_values": np.zeros((1, 3, 8, 8), np.float32)},
    },
}


@pytest.mark.parametrize("prompt", BAD.values(), ids=BAD.keys())
def test_a_wrong_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match=r"prompt|multi_modal_data|token ids|pixel_values"):
        process(prompt)


def test_ids_out_of_range_are_counted_and_the_first_is_named():
    with pytest.raises(
        ValueError, match=r"2 token ids .* \[0, 704\), the first is 900 at position 1"
    ):
        process({"prompt_token_ids": [1, 900, 3, 704]})


def test_limits_reach_the_images():
    with pytest.raises(ImageError, match="max_pixels"):
        process(with_images("<image>", A), limits=ImageLimits(max_pixels=10))
