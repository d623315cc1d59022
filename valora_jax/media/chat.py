"""Chat messages in OpenAI's form -> the prompt text and its images, by the model's chat template.

A template takes a message's content either as a list of parts, or as one string; which one is
found by trying. For string templates, images are written as placeholder lines before the text.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from valora_jax.media.images import ImageSource

type Messages = Sequence[Mapping[str, Any]]

_ROLES = ("system", "user", "assistant", "tool")
_PARTS = '{"type": "text"}, {"type": "image"} and {"type": "image_url"}'


def render_chat(
    template: str,
    messages: Messages,
    *,
    image_token: str,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = True,
) -> tuple[str, list[ImageSource]]:
    """Renders messages into a prompt with one `image_token` an image.

    Args:
      template: Jinja source; runs in transformers' sandbox.
      messages: each `{"role": ..., "content": ...}`, content a string or a list of
        `{"type": "text", "text": str}`, `{"type": "image", "image": source}` (without "image": a
        placeholder whose image comes by another way) and
        `{"type": "image_url", "image_url": {"url": "data:..."}}`. An image_url is data from
        elsewhere and so never a local path; a source under "image" may be one.
      image_token: how a string template's prompt marks an image.
      special_tokens: the template's variables, such as bos_token.
      add_generation_prompt: whether the text ends by opening the answer.

    Returns:
      The text, and the images in the order of the messages.

    Raises:
      ValueError: a message has the wrong shape (its index is named), or the template refuses.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("a chat needs a list of at least one message")
    images: list[ImageSource] = []
    conversation = [_normalize(i, message, images) for i, message in enumerate(messages)]
    if content_format(template) == "string":
        conversation = [_flatten(message, image_token) for message in conversation]
    options = {**special_tokens, "add_generation_prompt": add_generation_prompt}
    return _render(template, conversation, options), images


@functools.lru_cache(maxsize=16)
def content_format(template: str) -> Literal["string", "parts"]:
    """Finds out whether a template reads a list of parts, by giving it one."""
    parts = [{"type": "text", "text": "probe"}]
    # Special tokens that are undefined would fail a template for another reason.
    blank: dict[str, str] = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")
    try:
        text = _render(template, [{"role": "user", "content": parts}], blank)
    except ValueError:
        return "string"
    printed_whole = repr(parts) in text or json.dumps(parts) in text
    return "parts" if "probe" in text and not printed_whole else "string"


def _normalize(index: int, message: Any, images: list[ImageSource]) -> dict[str, Any]:
    """The message with its content as parts; its images move to the end of `images`."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is a {type(message).__name__}, want role and content")
    if message.get("role") not in _ROLES:
        raise ValueError(f"{where} has role {message.get('role')!r}; use one of {list(_ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise ValueError(
            f"{where} has a content of type {type(content).__name__}, want a string or a list of "
            f"{_PARTS}"
        )
    parts = [_part(f"{where}.content[{i}]", part, images) for i, part in enumerate(content)]
    return {**message, "content": parts}


def _part(where: str, part: Any, images: list[ImageSource]) -> dict[str, str]:
    match part:
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image", "image": source}:
            images.append(source)
        case {"type": "image"}:
            pass
        case {"type": "image_url", "image_url": {"url": str(url)}}:
            images.append(_url(where, url))
        case _:
            shown = repr(part)[:120]
            raise ValueError(f"{where} is {shown}; supported are {_PARTS} with their fields")
    return {"type": "image"}


def _url(where: str, url: str) -> str:
    # http is passed on: the reader of images refuses it and says why.
    if url[:8].lower().startswith(("data:", "http://", "https://")):
        return url
    raise ValueError(
        f"{where} has image_url {url[:60]!r}, want a data: URL; "
        'for a local file write {"type": "image", "image": path}'
    )


def _flatten(message: dict[str, Any], image_token: str) -> dict[str, Any]:
    parts = message["content"]
    lines = [image_token for part in parts if part["type"] == "image"]
    lines += [part["text"] for part in parts if part["type"] == "text"]
    return {**message, "content": "\n".join(lines)}


def _render(template: str, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
    # Late, because transformers takes seconds to import and only chats need it. It would announce
    # on stderr that PyTorch is missing, which is as it should be here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template([messages], chat_template=template, **options)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"the chat template does not take these messages: {error}") from error
    return rendered[0]
