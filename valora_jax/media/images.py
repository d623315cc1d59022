"""Images of any source -> upright RGB `PIL.Image.Image`.

Everything hostile ends in `ImageError`: what cannot be read, what is truncated, and what would
decode to more pixels than `ImageLimits` allows (read from the header, before anything is decoded).
Reads local files and memory, never the network.
"""

import base64
import binascii
import dataclasses
import hashlib
import io
import os
import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from valora_jax.errors import ImageError

type ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

# Pillow itself refuses to open what has more pixels than this.
_PILLOW_MAX_PIXELS = 2 * 89_478_485

# Raster formats only: among the others are readers that start programs (EPS) or follow references.
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# `warnings.catch_warnings` swaps process-wide state, so two threads must not be inside it at once.
_HEADER_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What one image may cost.

    Attributes:
      max_pixels: width x height; decoding takes up to 4 bytes a pixel, 3 more as RGB.
      max_encoded_bytes: size of the file, or of the data after base64.
    """

    max_pixels: int = 64 * 2**20
    max_encoded_bytes: int = 64 * 2**20

    def __post_init__(self):
        if not 1 <= self.max_pixels <= _PILLOW_MAX_PIXELS:
            raise ValueError(
                f"max_pixels={self.max_pixels} is outside [1, {_PILLOW_MAX_PIXELS}], "
                "Pillow's own bound; choose one inside"
            )
        if self.max_encoded_bytes < 1:
            raise ValueError(f"max_encoded_bytes={self.max_encoded_bytes} must be at least 1")


def load_image(source: ImageSource, *, limits: ImageLimits | None = None) -> Image.Image:
    """Reads an image, turns it upright by its EXIF orientation and converts it to RGB.

    Args:
      source: a path, the bytes of an image file, a `data:image/...;base64,` URL, a PIL image, or a
        uint8 array `[H, W, 3]` (RGB) or `[H, W]` (grey). Of an animation, the first frame counts.
      limits: sizes to refuse; `ImageLimits()` when None.

    Returns:
      An RGB image of its own: later changes to `source` do not reach it. Transparency is blended
      onto white, as people see it and as transformers does since 5.23.

    Raises:
      ImageError: the image cannot be read, is empty, or exceeds a limit.
    """
    limits = limits or ImageLimits()
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    if isinstance(source, Image.Image):
        _check_pixels(source.size, limits)
        return _decode(source, "the PIL image")
    data, name = _encoded_bytes(source, limits)
    image = _open(data, name, limits)
    with image:
        return _decode(image, name)


def content_hash(image: Image.Image) -> bytes:
    """Returns 16 bytes that differ whenever the size or any RGB byte of two RGB images does."""
    digest = hashlib.blake2b(f"{image.width}x{image.height}:".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.digest()


def _from_array(array: np.ndarray, limits: ImageLimits) -> Image.Image:
    if array.dtype != np.uint8 or not (
        array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    ):
        raise ImageError(
            f"an image array must be uint8 [H, W, 3] or [H, W], not {array.dtype} "
            f"{list(array.shape)}; convert it, or pass a PIL image"
        )
    _check_pixels((array.shape[1], array.shape[0]), limits)
    # A copy, since Pillow would share the array's memory.
    return Image.fromarray(np.array(array, order="C")).convert("RGB")


def _encoded_bytes(
    source: str | os.PathLike[str] | bytes, limits: ImageLimits
) -> tuple[bytes, str]:
    """The bytes of an image file and a name for messages."""
    if isinstance(source, bytes | bytearray | memoryview):
        _check_encoded(len(source), "the image", limits)
        return bytes(source), f"the image of {len(source)} bytes"
    if isinstance(source, str):
        scheme = source[:8].lower()
        if scheme.startswith("data:"):
            return _from_data_url(source, limits)
        if scheme.startswith(("http://", "https://")):
            raise ImageError(
                f"{source[:100]!r}: images are not fetched from the network; "
                "download it and pass the bytes, a path or a data: URL"
            )
    if not isinstance(source, str | os.PathLike):
        raise ImageError(
            f"an image cannot come from a {type(source).__name__}; pass a path, bytes, "
            "a data: URL, a PIL image or a uint8 array"
        )
    return _from_file(Path(source), limits)


def _from_file(path: Path, limits: ImageLimits) -> tuple[bytes, str]:
    name = repr(str(path)[:200])
    try:
        size_bytes = path.stat().st_size if path.is_file() else None
        if size_bytes is not None:
            _check_encoded(size_bytes, name, limits)
            return path.read_bytes(), name
    except OSError as error:
        raise ImageError(f"cannot read {name}: {error.strerror}") from error
    raise ImageError(f"{name} is not a file; check the path (it is relative to {Path.cwd()})")


def _from_data_url(url: str, limits: ImageLimits) -> tuple[bytes, str]:
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().startswith("data:image/") or not header.endswith(";base64"):
        raise ImageError(
            f"a data URL must start with 'data:image/<type>;base64,', this one with {url[:40]!r}"
        )
    _check_encoded(len(payload) * 3 // 4, "the data URL", limits)
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data URL is not valid base64: {error}; encode it again") from error
    return data, f"the data URL of {len(data)} bytes"


def _open(data: bytes, name: str, limits: ImageLimits) -> Image.Image:
    """Parses the header only, and checks the size that it declares."""
    try:
        # Pillow's warning about large images is ours to give, as an error and at our own limit.
        with _HEADER_LOCK, warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Exception as error:  # decoders raise anything on hostile bytes
        kinds = ", ".join(_FORMATS)
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ImageError(f"cannot read {name}: {reason}; supported are {kinds}") from error
    _check_pixels(image.size, limits)
    return image


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        orientation = _orientation(image)
        rgb = _on_white(image) if _has_alpha(image) else image.convert("RGB")
        return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb
    except Exception as error:  # decoders raise anything on hostile bytes
        raise ImageError(f"cannot decode {name}: {error}; save it again and retry") from error


def _has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or image.info.get("transparency") is not None


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none.

    `ImageOps.exif_transpose` also writes the remaining tags back, which fails for damaged ones; a
    picture whose EXIF block alone is damaged is still a picture.
    """
    try:
        with _HEADER_LOCK, warnings.catch_warnings(action="ignore"):
            return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the parser raises anything on hostile bytes
        return 1


def _check_pixels(size_WH: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size_WH
    if width < 1 or height < 1:
        raise ImageError(f"the image is empty: {width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"the image has {width} x {height} = {width * height} pixels, the limit is "
            f"{limits.max_pixels}; make it smaller or raise ImageLimits.max_pixels"
        )


def _check_encoded(size_bytes: int, name: str, limits: ImageLimits) -> None:
    if size_bytes > limits.max_encoded_bytes:
        raise ImageError(
            f"{name} takes {size_bytes} bytes, the limit is {limits.max_encoded_bytes}; "
            "make it smaller or raise ImageLimits.max_encoded_bytes"
        )
