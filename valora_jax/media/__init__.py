"""Images, prompts and text -> NumPy arrays and token ids, and token ids -> text. No jax in here."""

from valora_jax.media.chat import render_chat
from valora_jax.media.clip_pixels import ClipPixels
from valora_jax.media.detokenizer import IncrementalDetokenizer
from valora_jax.media.images import ImageLimits, ImageSource, content_hash, load_image
from valora_jax.media.prompts import (
    ProcessedPrompt,
    Prompt,
    PromptImage,
    process_prompt,
)
from valora_jax.media.stop_strings import StopStrings
from valora_jax.media.tokenizer import Tokenizer

__all__ = [
    "ClipPixels",
    "ImageLimits",
    "ImageSource",
    "IncrementalDetokenizer",
    "ProcessedPrompt",
    "Prompt",
    "PromptImage",
    "StopStrings",
    "Tokenizer",
    "content_hash",
    "load_image",
    "process_prompt",
    "render_chat",
]
