import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from valora_jax.media import ClipPixels, clip_pixels, load_image
from valora_jax.media.resample import resize_window

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
CHECKPOINT = GOLDENS / "checkpoints" / "llava15-tiny"
PIXELS = np.load(GOLDENS / "text" / "pixels.npz")
HF = json.loads((CHECKPOINT / "preprocessor_config.json").read_text())
RNG = np.random.default_rng(0)

edges = st.integers(1, 90)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def transformers_pixels(image: Image.Image, **config) -> np.ndarray:
    from transformers.models.clip.image_processing_pil_clip import (  # slow to import
        CLIPImageProcessorPil,
    )

    names = ("image_processor_type", "processor_class")
    options = {k: v for k, v in {**HF, **config}.items() if k not in names}
    return CLIPImageProcessorPil(**options)(image, return_tensors="np")["pixel_values"][0]


@pytest.mark.parametrize("name", PIXELS.files)
def test_pixels_match_the_golden(name):
    image = load_image(GOLDENS / "text" / "images" / f"{name}.png")
    got = ClipPixels.from_folder(CHECKPOINT)(image)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, PIXELS[name])  # the same operations in the same order


@settings(max_examples=60)
@given(edges, edges, st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_any_size_and_crop_match_transformers(width, height, shortest, crop_height, crop_width):
    image = picture(width, height)
    config = {
        "size": {"shortest_edge": shortest},
        "crop_size": {"height": crop_height, "width": crop_width},
    }
    want = transformers_pixels(image, **config)
    np.testing.assert_array_equal(ClipPixels.from_hf({**HF, **config})(image), want)


@pytest.mark.parametrize(
    "config",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_resize": False},
        {"do_center_crop": False, "size": {"height": 20, "width": 30}},
        {"size": 40, "crop_size": 30},
        {"rescale_factor": 1 / 127.5, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ],
    ids=str,
)
def test_each_step_can_be_switched(config):
    image = picture(70, 50)
    pixels = ClipPixels.from_hf({**HF, **config})
    got = pixels(image)
    assert got.shape == (3, *pixels.output_size)
    np.testing.assert_array_equal(got, np.float32(transformers_pixels(image, **config)))


@settings(max_examples=100)
@given(edges, edges, st.integers(1, 200), st.integers(1, 200), st.data())
def test_a_window_is_bit_for_bit_a_part_of_pillows_resize(width, height, new_w, new_h, data):
    image = picture(width, height)
    whole = np.asarray(image.resize((new_w, new_h), Image.Resampling.BICUBIC))
    top, left = data.draw(st.integers(0, new_h - 1)), data.draw(st.integers(0, new_w - 1))
    rows, columns = data.draw(st.integers(1, new_h - top)), data.draw(st.integers(1, new_w - left))
    got = resize_window(np.asarray(image), (new_h, new_w), (top, left, rows, columns))
    np.testing.assert_array_equal(got, whole[top : top + rows, left : left + columns])


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (2, 3001), (700, 3)])
def test_the_path_for_thin_pictures_gives_the_same_pixels(size, monkeypatch):
    image = picture(*size)
    pixels = ClipPixels.from_folder(CHECKPOINT)
    want = pixels(image)
    monkeypatch.setattr(clip_pixels, "_MAX_RESIZED_PIXELS", 0)
    np.testing.assert_array_equal(pixels(image), want)


def test_a_line_a_million_pixels_long_costs_only_its_middle():
    pixels = ClipPixels.from_hf({**HF, "size": 336, "crop_size": 336})  # 336 million x 336 whole
    middle = np.s_[500_000 - 8 : 500_000 + 8]
    line_HWC = np.zeros((1, 1_000_000, 3), np.uint8)
    line_HWC[:, middle] = 255
    assert pixels(Image.fromarray(line_HWC)).min() > 1


def test_a_folder_with_processor_config_alone_is_read(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": HF}))
    assert ClipPixels.from_folder(tmp_path) == ClipPixels.from_folder(CHECKPOINT)


def test_what_clip_does_not_do_is_refused(tmp_path):
    for config in (
        {"image_processor_type": "SiglipImageProcessor"},
        {"resample": 2},
        {"do_pad": True},
        {"size": {"shortest_edge": 10, "longest_edge": 20}},
        {"do_center_crop": False},
    ):
        with pytest.raises(NotImplementedError):
            ClipPixels.from_hf({**HF, **config})
    for config in ({"size": 0}, {"crop_size": {"height": -1, "width": 3}}, {"image_std": [1.0]}):
        with pytest.raises(ValueError, match=next(iter(config))):
            ClipPixels.from_hf({**HF, **config})
    with pytest.raises(ValueError, match=r"neither preprocessor_config\.json"):
        ClipPixels.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        ClipPixels.from_folder(tmp_path)
