"""CLIP's image preprocessing: an RGB image -> float32 `[3, H, W]`, bit for bit Hugging Face's.

Follows `transformers.models.clip` (5.17, the Pillow backend): resize in 8 bits, centre crop with
zero padding, then rescale and normalise. The output size is fixed by the configuration; one that
would let it vary from image to image is refused. C channels, H and W rows and columns.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from valora_jax.media.folder import read_json
from valora_jax.media.resample import resize_window

_TYPES = (
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPFeatureExtractor",
)
_KNOWN_STEPS = {"do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"}
# Above this many pixels the resized image is not built whole: only very thin pictures get there.
_MAX_RESIZED_PIXELS = 16 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClipPixels:
    """Image preprocessing as a callable; a step whose field is None is not done.

    Attributes:
      resize: length of the shortest edge, or (height, width).
      crop_HW: height and width of the centre crop.
      rescale: factor on the 8-bit values.
      mean, std: of each channel, applied after `rescale`; both or neither.
    """

    resize: int | tuple[int, int] | None
    crop_HW: tuple[int, int] | None
    rescale: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None

    def __post_init__(self):
        if self.crop_HW is None and not isinstance(self.resize, tuple):
            raise NotImplementedError(
                f"resize={self.resize} without a centre crop gives images of varying size; only "
                "fixed sizes are supported: set do_center_crop, or size to a height and a width"
            )

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> "ClipPixels":
        """Reads `preprocessor_config.json`, or `image_processor` in `processor_config.json`.

        Raises:
          ValueError: neither file is there, or a value has the wrong form.
          NotImplementedError: another kind of processor, or a step that CLIP's does not have.
        """
        return cls.from_hf(_read_config(Path(path)))

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "ClipPixels":
        """Reads the content of a `preprocessor_config.json`; see `from_folder`."""
        kind = hf.get("image_processor_type", hf.get("feature_extractor_type"))
        if kind not in _TYPES:
            raise NotImplementedError(
                f"image processor {kind!r}; only CLIP's is supported ({', '.join(_TYPES)})"
            )
        strange = sorted(k for k in hf if k.startswith("do_") and hf[k] and k not in _KNOWN_STEPS)
        if strange:
            raise NotImplementedError(f"preprocessing steps {strange} are not supported")
        # CLIP's own defaults stand in for what a folder leaves out.
        resize = _size("size", hf.get("size", 224))
        crop = _size("crop_size", hf.get("crop_size", 224))
        if hf.get("do_resize", True) and hf.get("resample", 3) != Image.Resampling.BICUBIC:
            raise NotImplementedError(
                f"resample={hf['resample']}; only {int(Image.Resampling.BICUBIC)} (bicubic) is "
                "supported"
            )
        normalize = hf.get("do_normalize", True)
        mean = hf.get("image_mean", (0.48145466, 0.4578275, 0.40821073))
        std = hf.get("image_std", (0.26862954, 0.26130258, 0.27577711))
        return cls(
            resize=resize if hf.get("do_resize", True) else None,
            crop_HW=_square(crop) if hf.get("do_center_crop", True) else None,
            rescale=float(hf.get("rescale_factor", 1 / 255))
            if hf.get("do_rescale", True)
            else None,
            mean=_per_channel("image_mean", mean) if normalize else None,
            std=_per_channel("image_std", std) if normalize else None,
        )

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of every output."""
        size = self.crop_HW or self.resize
        assert isinstance(size, tuple)  # __post_init__ has seen to it
        return size

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Preprocesses one RGB image (`load_image` makes one); returns `[3, H, W]` float32."""
        if image.mode != "RGB":
            raise ValueError(
                f"image mode {image.mode!r}; convert it to RGB first (load_image does)"
            )
        x_HWC = self._resize_and_crop(image)
        x_CHW = np.ascontiguousarray(x_HWC.transpose(2, 0, 1))
        if self.rescale is not None:
            x_CHW = (x_CHW.astype(np.float64) * self.rescale).astype(np.float32)
        x_CHW = x_CHW.astype(np.float32, copy=False)
        if self.mean is not None:
            mean_C = np.array(self.mean, np.float32)
            std_C = np.array(self.std, np.float32)
            x_CHW = (x_CHW - mean_C[:, None, None]) / std_C[:, None, None]
        return x_CHW

    def _resize_and_crop(self, image: Image.Image) -> np.ndarray:
        height, width = self._resized_size(image)
        crop_H, crop_W = self.crop_HW or (height, width)
        top, rows, above = _center(height, crop_H)
        left, columns, before = _center(width, crop_W)
        if height * width <= _MAX_RESIZED_PIXELS:
            if self.resize is not None:
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            x_HWC = np.asarray(image.crop((left, top, left + columns, top + rows)))
        else:
            window = (top, left, rows, columns)
            x_HWC = resize_window(np.asarray(image), (height, width), window)
        after, below = crop_W - columns - before, crop_H - rows - above
        if above or below or before or after:
            x_HWC = np.pad(x_HWC, ((above, below), (before, after), (0, 0)))
        return x_HWC

    def _resized_size(self, image: Image.Image) -> tuple[int, int]:
        if self.resize is None:
            return image.height, image.width
        if isinstance(self.resize, tuple):
            return self.resize
        short, long = sorted(image.size)
        new_long = int(self.resize * long / short)
        wide = image.width > image.height
        return (self.resize, new_long) if wide else (new_long, self.resize)


def _center(length: int, crop: int) -> tuple[int, int, int]:
    """Start and number of the pixels to keep along one edge, and the zeros that go before them.

    An odd remainder goes after the kept pixels when cropping and before them when padding.
    """
    if length >= crop:
        return (length - crop) // 2, crop, 0
    return 0, length, (crop - length + 1) // 2


def _read_config(folder: Path) -> dict[str, Any]:
    own, shared = folder / "preprocessor_config.json", folder / "processor_config.json"
    if own.is_file():
        return read_json(own)
    if shared.is_file() and "image_processor" in (config := read_json(shared)):
        return config["image_processor"]
    raise ValueError(
        f"{folder} has neither preprocessor_config.json nor an image_processor in "
        "processor_config.json; copy them from the checkpoint"
    )


def _size(name: Literal["size", "crop_size"], value: Any) -> int | tuple[int, int]:
    """An edge length, or height and width."""
    edges = value if isinstance(value, dict) else {"shortest_edge": value}
    if any(not isinstance(edge, int) or edge < 1 for edge in edges.values()):
        raise ValueError(f"{name}={value}: edges must be positive integers")
    if edges.keys() == {"shortest_edge"}:
        return edges["shortest_edge"]
    if edges.keys() == {"height", "width"}:
        return edges["height"], edges["width"]
    raise NotImplementedError(
        f"{name}={value}; supported are a number, {{shortest_edge}} and {{height, width}}"
    )


def _square(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def _per_channel(name: str, value: Any) -> tuple[float, float, float]:
    numbers = tuple(float(v) for v in (value if isinstance(value, list | tuple) else [value] * 3))
    if len(numbers) != 3:
        raise ValueError(f"{name} has {len(numbers)} values, want 3: one a channel")
    return numbers
