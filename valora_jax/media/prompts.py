"""Prompts in vLLM's form -> token ids with room for image features, and preprocessed images.

A text holds one placeholder an image and is expanded after tokenising. Token ids may hold one
placeholder id an image too, or be expanded already: then every run of placeholder ids is a
multiple of `tokens_per_image` long. X images, C channels, H and W rows and columns.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np

from valora_jax.media.clip_pixels import ClipPixels
from valora_jax.media.images import ImageLimits, ImageSource, content_hash, load_image
from valora_jax.media.tokenizer import Tokenizer


class MultiModalData(TypedDict, total=False):
    """Either images to preprocess, or ready `pixel_values`: `[X, 3, H, W]` of a float dtype."""

    image: ImageSource | Sequence[ImageSource]
    pixel_values: np.ndarray


class TextPrompt(TypedDict):
    prompt: str
    multi_modal_data: NotRequired[MultiModalData]


class TokensPrompt(TypedDict):
    prompt_token_ids: Sequence[int]
    multi_modal_data: NotRequired[MultiModalData]


type Prompt = str | TextPrompt | TokensPrompt


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PromptImage:
    """One image of a prompt and the slots that its features fill.

    Attributes:
      pixels_CHW: `[3, H, W]` float32, preprocessed.
      content_hash: equal for equal images; the key of caches.
      start: index of its first slot in the prompt's token ids.
      length: number of slots, in tokens.
    """

    pixels_CHW: np.ndarray
    content_hash: bytes
    start: int
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProcessedPrompt:
    """Token ids, placeholders expanded, and the images in their order."""

    token_ids: tuple[int, ...]
    images: tuple[PromptImage, ...]


def process_prompt(
    prompt: Prompt,
    *,
    tokenizer: Tokenizer,
    pixels: ClipPixels,
    image_token: str,
    image_token_id: int,
    tokens_per_image: int,
    vocab_size: int,
    limits: ImageLimits | None = None,
) -> ProcessedPrompt:
    """Tokenises a prompt, expands its placeholders and preprocesses its images.

    Args:
      prompt: a text, or a dict with "prompt" or "prompt_token_ids" and maybe "multi_modal_data".
      tokenizer: the checkpoint's.
      pixels: the checkpoint's image preprocessing.
      image_token: text of the placeholder, such as `<image>`; for messages only.
      image_token_id: its id.
      tokens_per_image: slots that the features of one image fill.
      vocab_size: rows of the model's embedding; token ids lie in `[0, vocab_size)`.
      limits: sizes of images to refuse.

    Raises:
      ValueError: the prompt has the wrong form, is empty, holds an id out of range, or has another
        number of placeholders than of images.
      ImageError: an image cannot be read or is too large.
    """
    ids, data = _parse(prompt, tokenizer)
    _check_ids(ids, vocab_size)
    sources, ready_XCHW = _image_data(data, pixels)
    n_images = len(sources) if ready_XCHW is None else len(ready_XCHW)
    # Counted before any image is decoded: a wrong prompt should cost nothing.
    from_text = isinstance(prompt, str) or "prompt" in prompt
    n_placeholders, slots = _expand(
        ids, image_token_id, tokens_per_image, n_images, from_text=from_text
    )
    if n_placeholders != n_images:
        raise ValueError(
            f"the prompt has {n_placeholders} image placeholders ({image_token!r}, id "
            f"{image_token_id}) and {n_images} images came with it; write one placeholder for "
            f"each image (in token ids also a run of {tokens_per_image})"
        )
    if ready_XCHW is None:
        loaded = [load_image(source, limits=limits) for source in sources]
        prepared = [(pixels(image), content_hash(image)) for image in loaded]
    else:
        prepared = [(x_CHW, _pixels_hash(x_CHW)) for x_CHW in ready_XCHW]
    starts = [i for i, t in enumerate(slots) if t == image_token_id][::tokens_per_image]
    images = [
        PromptImage(pixels_CHW=x_CHW, content_hash=key, start=start, length=tokens_per_image)
        for (x_CHW, key), start in zip(prepared, starts, strict=True)
    ]
    return ProcessedPrompt(token_ids=tuple(slots), images=tuple(images))


def _parse(prompt: Prompt, tokenizer: Tokenizer) -> tuple[list[int], Mapping[str, Any]]:
    """Token ids, placeholders as given, and the multi_modal_data."""
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    if not isinstance(prompt, Mapping):
        raise ValueError(f"a prompt is a text or a dict, not a {type(prompt).__name__}")
    unknown = prompt.keys() - {"prompt", "prompt_token_ids", "multi_modal_data"}
    if unknown or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
        raise ValueError(
            f"a prompt has the keys {sorted(prompt)}, want either prompt or prompt_token_ids, "
            "and multi_modal_data where it has images"
        )
    data = prompt.get("multi_modal_data") or {}
    if not isinstance(data, Mapping):
        raise ValueError(f"multi_modal_data is a {type(data).__name__}, want a dict")
    if "prompt_token_ids" in prompt:
        return _token_ids(prompt["prompt_token_ids"]), data
    if not isinstance(prompt["prompt"], str):
        raise ValueError(f"prompt is a {type(prompt['prompt']).__name__}, want a text")
    return tokenizer.encode(prompt["prompt"]), data


def _token_ids(ids: Any) -> list[int]:
    if isinstance(ids, str | bytes) or not isinstance(ids, Sequence | np.ndarray):
        raise ValueError(f"prompt_token_ids is a {type(ids).__name__}, want a list of integers")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise ValueError(f"prompt_token_ids holds {token!r}, want integers")
    return [int(token) for token in ids]


def _check_ids(ids: list[int], vocab_size: int) -> None:
    if not ids:
        raise ValueError("the prompt has no tokens; give it at least one")
    wrong = [(i, token) for i, token in enumerate(ids) if not 0 <= token < vocab_size]
    if wrong:
        at, token = wrong[0]
        raise ValueError(
            f"{len(wrong)} token ids are outside [0, {vocab_size}), the first is {token} at "
            f"position {at}; use the checkpoint's own tokenizer"
        )


def _image_data(
    data: Mapping[str, Any], pixels: ClipPixels
) -> tuple[list[ImageSource], np.ndarray | None]:
    """Sources to load, or ready pixel values."""
    if len(data) > 1 or not data.keys() <= {"image", "pixel_values"}:
        raise ValueError(
            f"multi_modal_data has the keys {sorted(data)}, want either image or pixel_values"
        )
    if "pixel_values" in data:
        want = (3, *pixels.output_size)
        ready_XCHW = np.asarray(data["pixel_values"])
        if ready_XCHW.shape[1:] != want or not np.issubdtype(ready_XCHW.dtype, np.floating):
            raise ValueError(
                f"pixel_values is {ready_XCHW.dtype} {list(ready_XCHW.shape)}, want a float array "
                f"[images, {', '.join(map(str, want))}]"
            )
        return [], ready_XCHW.astype(np.float32)
    images = data.get("image")
    if images is None:
        return [], None
    return (list(images) if isinstance(images, list | tuple) else [images]), None


def _expand(
    ids: list[int], image_id: int, per_image: int, n_images: int, *, from_text: bool
) -> tuple[int, list[int]]:
    """The number of placeholders, and the ids with `per_image` slots in place of each."""
    n = ids.count(image_id)
    runs = (len(list(run)) for is_slot, run in itertools.groupby(ids, image_id.__eq__) if is_slot)
    if not from_text and n != n_images and all(length % per_image == 0 for length in runs):
        return n // per_image, ids  # expanded already
    return n, [t for id_ in ids for t in [id_] * (per_image if id_ == image_id else 1)]


def _pixels_hash(x_CHW: np.ndarray) -> bytes:
    digest = hashlib.blake2b(b"pixels:", digest_size=16)
    digest.update(np.ascontiguousarray(x_CHW).tobytes())
    return digest.digest()
