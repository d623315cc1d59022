"""Requests as lines of JSON, answered in one batch and in order.

A line that cannot be answered gets an answer with "error" and does not stop the others.
"""

import collections
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.errors import OutOfCapacityError, ValoraError

if TYPE_CHECKING:  # these bring jax
    from valora_jax.engine.engine import Engine
    from valora_jax.engine.outputs import RequestOutput
    from valora_jax.media.prompts import Prompt

_KEYS = ("id", "prompt", "messages", "images", "adapter", "sampling")
# Requests in the engine for each that runs: enough to keep it busy while the oldest takes its
# time, few enough that their decoded images do not fill the memory.
_AHEAD = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """What a line need not say.

    Attributes:
      folder: that image paths are relative to.
      raw: "prompt" is taken as it is, not as a chat's first message.
    """

    folder: Path
    sampling: SamplingParams
    adapter: str | None
    raw: bool


def as_prompt(
    engine: "Engine", text: str | None, *, images: Sequence[str | Path], raw: bool
) -> "Prompt":
    """A question with images as a prompt, through the chat template or as it is.

    Raises:
      ValueError: the checkpoint has no chat template.
    """
    if raw:
        return {"prompt": text or "", "multi_modal_data": {"image": list(images)}}
    if engine.parts.tokenizer.chat_template is None:
        raise ValueError("the checkpoint has no chat template; add --raw to give prompts as is")
    parts = [{"type": "image", "image": image} for image in images]
    content = [*parts, {"type": "text", "text": text or ""}]
    return engine.render_chat([{"role": "user", "content": content}])


def answer_of(output: "RequestOutput") -> dict[str, Any]:
    """An output as JSON: the answers, and the counts of tokens."""
    completion_tokens = sum(len(answer.token_ids) for answer in output.outputs)
    answer = {
        "adapter": output.adapter.name if output.adapter else None,
        "outputs": [_present(dataclasses.asdict(answer)) for answer in output.outputs],
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "cached_tokens": output.metrics.cached_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": len(output.prompt_token_ids) + completion_tokens,
        },
    }
    if output.prompt_logprobs is not None:
        scored = [None if one is None else _scores(one) for one in output.prompt_logprobs]
        answer["prompt_logprobs"] = scored
    return answer


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _scores(logprobs: Mapping[int, Any]) -> dict[int, dict[str, Any]]:
    return {token: dataclasses.asdict(one) for token, one in logprobs.items()}


def answer_requests(
    engine: "Engine", lines: Iterable[bytes], defaults: Defaults
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields each request's line number and its answer, in order, as soon as it is there."""
    started: collections.deque[_Started] = collections.deque()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(started) >= _AHEAD * engine.config.max_requests:
            yield started.popleft().answer()
        request = _Started(engine, number, line, defaults)
        while isinstance(request.begun, OutOfCapacityError) and started:
            yield started.popleft().answer()
            request = _Started(engine, number, line, defaults)
        started.append(request)
    while started:
        yield started.popleft().answer()


class _Started:
    """One line: its stream of outputs, or why there is none."""

    def __init__(self, engine: "Engine", number: int, line: bytes, defaults: Defaults):
        self._number, self._id = number, number
        self.begun: Iterator[RequestOutput] | Exception
        try:
            fields = _fields(line)
            self._id = fields.get("id", number)
            self.begun = _begin(engine, fields, defaults)
        except (ValoraError, ValueError, NotImplementedError, OSError) as error:
            self.begun = error

    def answer(self) -> tuple[int, dict[str, Any]]:
        """Runs the engine until the answer is whole; every request in it moves on."""
        if isinstance(self.begun, Exception):
            return self._number, {"id": self._id, "error": str(self.begun)}
        try:
            *_, output = self.begun
        except (ValoraError, ValueError, NotImplementedError, OSError) as error:
            return self._number, {"id": self._id, "error": str(error)}
        return self._number, {"id": self._id, **answer_of(output)}


def _fields(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a request is an object, not a {type(fields).__name__}")
    return fields


def _begin(
    engine: "Engine", fields: dict[str, Any], defaults: Defaults
) -> "Iterator[RequestOutput]":
    _check(fields)
    folder = defaults.folder
    images = [_source(folder, image) for image in fields.get("images") or ()]
    if "messages" in fields:
        prompt = _conversation(engine, fields["messages"], images, folder)
    else:
        prompt = as_prompt(engine, fields["prompt"], images=images, raw=defaults.raw)
    sampling = dataclasses.replace(defaults.sampling, **(fields.get("sampling") or {}))
    return engine.stream(prompt, sampling, adapter=fields.get("adapter", defaults.adapter))


def _check(fields: dict[str, Any]) -> None:
    """Raises ValueError with every fault of a line's form."""
    faults = [
        f"unknown key {key!r}; known: {', '.join(_KEYS)}" for key in fields if key not in _KEYS
    ]
    if ("prompt" in fields) == ("messages" in fields):
        faults.append('want either "prompt" or "messages"')
    if "prompt" in fields and not isinstance(fields["prompt"], str):
        faults.append(f'"prompt" is {fields["prompt"]!r:.60}, want a text')
    images = fields.get("images") or []
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        faults.append(f'"images" is {images!r:.60}, want a list of paths')
    if not isinstance(adapter := fields.get("adapter"), str | None):
        faults.append(f'"adapter" is {adapter!r:.60}, want a name')
    sampling = fields.get("sampling") or {}
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    if not isinstance(sampling, dict):
        faults.append(f'"sampling" is {sampling!r:.60}, want an object')
    elif unknown := sorted(sampling.keys() - set(known)):
        faults.append(f'"sampling" has no {", ".join(unknown)}; known: {", ".join(known)}')
    if faults:
        raise ValueError("; ".join(faults))


def _conversation(
    engine: "Engine", messages: Any, images: list[str | Path], folder: Path
) -> "Prompt":
    """Images are in the messages, or beside them for the messages' `{"type": "image"}`."""
    rendered: Any = engine.render_chat(messages)
    inside = [_source(folder, image) for image in rendered["multi_modal_data"]["image"]]
    if inside and images:
        raise ValueError('images are in "messages" and in "images"; put them all in one place')
    return {"prompt": rendered["prompt"], "multi_modal_data": {"image": inside or images}}


def _source(folder: Path, image: Any) -> Any:
    """A path is relative to the file of requests; data: URLs and others stay as they are."""
    if isinstance(image, str) and not image[:8].lower().startswith(
        ("data:", "http://", "https://")
    ):
        return folder / image
    return image
