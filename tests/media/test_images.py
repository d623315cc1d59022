import base64
import contextlib
import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from valora_jax.errors import ImageError
from valora_jax.media import ImageLimits, content_hash, load_image

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (6, 9, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_every_source_gives_the_same_picture(tmp_path):
    data = encoded(Image.fromarray(PICTURE))
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), data, url, Image.fromarray(PICTURE), PICTURE):
        np.testing.assert_array_equal(np.asarray(load_image(source)), PICTURE)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_a_mode_becomes_rgb_as_pillow_converts_it(mode):
    image = Image.fromarray(PICTURE).convert(mode)
    got = load_image(image)
    assert got.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(got), np.asarray(image.convert("RGB")))


def test_sixteen_bit_grey_becomes_rgb_as_pillow_converts_it():
    image = Image.fromarray(RNG.integers(0, 2**16, (4, 5), np.uint16))
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_blended_onto_white(mode):
    alpha = np.zeros(PICTURE.shape[:2], np.uint8)
    alpha[:, 1:] = 255
    image = Image.fromarray(PICTURE).convert(mode.removesuffix("A"))
    opaque = np.asarray(image.convert("RGB"))
    image.putalpha(Image.fromarray(alpha))
    got = np.asarray(load_image(encoded(image)))
    assert (got[:, 0] == 255).all()
    np.testing.assert_array_equal(got[:, 1:], opaque[:, 1:])


def test_a_palette_with_transparency_is_blended_too():
    palette = Image.fromarray(PICTURE).quantize(8)
    got = np.asarray(load_image(encoded(palette, transparency=bytes(8))))
    assert (got == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = np.asarray(load_image(encoded(Image.fromarray(PICTURE), exif=exif.tobytes())))
    turned = PICTURE.transpose(1, 0, 2) if orientation > 4 else PICTURE
    flips = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}
    np.testing.assert_array_equal(got, np.flip(turned, flips.get(orientation, ())))


def test_a_damaged_exif_block_does_not_cost_the_picture():
    data = encoded(Image.fromarray(PICTURE), exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    np.testing.assert_array_equal(np.asarray(load_image(data)), PICTURE)


def test_a_bomb_is_refused_from_its_header():
    for side in (10_000, 60_000):  # below and above where Pillow itself refuses
        with warnings.catch_warnings(action="error"), pytest.raises(ImageError, match="pixels"):
            load_image(png_header(side, side))


def test_the_limits_name_the_values_and_the_way_out():
    with pytest.raises(ImageError, match=r"9 x 6 = 54 pixels, the limit is 53; .*max_pixels"):
        load_image(PICTURE, limits=ImageLimits(max_pixels=53))
    with pytest.raises(ImageError, match=r"the limit is 10; .*max_encoded_bytes"):
        load_image(encoded(Image.fromarray(PICTURE)), limits=ImageLimits(max_encoded_bytes=10))
    with pytest.raises(ValueError, match="max_pixels=0"):
        ImageLimits(max_pixels=0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_image_is_refused(kind):
    data = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)), kind)
    with pytest.raises(ImageError, match="cannot"):
        load_image(data[: len(data) // 2])


BAD = {
    "empty": b"",
    "text": b"hello",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n",
    "missing_file": "no/such/file.png",
    "nul_in_path": "a\0b.png",
    "directory": "/",
    "network": "https://example.com/a.png",
    "url_without_base64": "data:image/png,abc",
    "url_of_text": "data:text/plain;base64,aGVsbG8=",
    "url_bad_base64": "data:image/png;base64,@@@@",
    "none": None,
    "number": 3,
    "float_array": PICTURE / 255,
    "four_channels": np.zeros((2, 2, 4), np.uint8),
    "no_rows": np.zeros((0, 5, 3), np.uint8),
    "empty_pil": Image.new("RGB", (0, 4)),
}


@pytest.mark.parametrize("source", BAD.values(), ids=BAD.keys())
def test_what_is_no_image_is_refused(source):
    with pytest.raises(ImageError):
        load_image(source)


@settings(max_examples=150)
@given(st.data())
def test_damaged_files_load_or_are_refused_and_nothing_else(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]))
    damaged = bytearray(encoded(Image.fromarray(PICTURE), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        assert load_image(bytes(damaged)).mode == "RGB"


def test_threads_leave_the_warning_filters_as_they_were():
    before = list(warnings.filters)
    data = encoded(Image.fromarray(PICTURE))
    threads = [
        threading.Thread(target=lambda: [load_image(data) for _ in range(20)]) for _ in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_the_hash_tells_pixels_and_shape_apart():
    image = load_image(PICTURE)
    changed = PICTURE.copy()
    changed[3, 4, 1] ^= 1
    reshaped = PICTURE.reshape(9, 6, 3)
    assert content_hash(image) == content_hash(load_image(encoded(image)))
    assert len({content_hash(load_image(x)) for x in (PICTURE, changed, reshaped)}) == 3
