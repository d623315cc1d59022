"""A caller's prompt in the engine: one job for each of its `n` answers, and their common output."""

import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from valora_jax.engine.answer import Answer, PromptScores
from valora_jax.engine.core import Job
from valora_jax.engine.outputs import ClassificationOutput, RequestOutput
from valora_jax.engine.request import ImageSpan, Request
from valora_jax.engine.sampler import MAX_BANNED
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.engine.start import Parts
from valora_jax.errors import RequestTooLongError
from valora_jax.lora.host_store import AdapterRef
from valora_jax.media.chat import Messages, render_chat
from valora_jax.media.prompts import ProcessedPrompt, Prompt, process_prompt


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckedPrompt:
    """A prompt that the engine can run: tokenised, its images read, short enough.

    Attributes:
      text: None where token ids were given.
      keep_logits: hand out the logits of every prompt token.
      classify: ask the adapter's task head.
    """

    text: str | None
    processed: ProcessedPrompt
    params: SamplingParams
    keep_logits: bool = False
    classify: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Generation:
    """One prompt's jobs, by index of the answer."""

    id: str
    text: str | None
    jobs: list[Job]

    @property
    def finished(self) -> bool:
        return all(job.finished for job in self.jobs)

    @property
    def tokens(self) -> int:
        """Output tokens so far, of all answers."""
        return sum(len(job.request.output_token_ids) for job in self.jobs)

    def output(self) -> RequestOutput:
        """The output as far as it has come; raises what ended a job, if something failed."""
        for job in self.jobs:
            if job.error is not None:
                raise job.error
        first = self.jobs[0]
        scores = first.scores
        return RequestOutput(
            request_id=self.id,
            prompt=self.text,
            prompt_token_ids=first.request.prompt_token_ids,
            outputs=[job.answer.output() for job in self.jobs],
            finished=self.finished,
            metrics=first.metrics(),
            prompt_logprobs=list(scores.logprobs) if scores and scores.number is not None else None,
            adapter=first.request.adapter,
        )

    def classified(self, classes_of: Callable[[AdapterRef], int]) -> ClassificationOutput:
        """What the task head of the adapter said; `classes_of` counts an adapter's classes."""
        output, all_C = self.output(), self.jobs[0].classes
        assert output.adapter is not None  # the caller saw that it has a task head
        assert all_C is not None  # the request has run
        return ClassificationOutput.of(output, all_C[: classes_of(output.adapter)])


class Prompts:
    """Checks prompts and makes generations of them."""

    def __init__(self, parts: Parts, *, seed: int):
        """`seed` draws the seeds of requests that bring none."""
        self._parts, self._seeds, self._numbers = parts, random.Random(seed), itertools.count()

    def of_chat(self, messages: Messages) -> Prompt:
        """A conversation through the chat template.

        Raises:
          ValueError: messages have the wrong form, or the checkpoint has no chat template.
        """
        tokenizer = self._parts.tokenizer
        if tokenizer.chat_template is None:
            raise ValueError("the checkpoint has no chat template; call generate with a prompt")
        text, images = render_chat(
            tokenizer.chat_template,
            messages,
            image_token=self._parts.spec.image_token,
            special_tokens=tokenizer.special_tokens,
        )
        return {"prompt": text, "multi_modal_data": {"image": images}}

    def check(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        keep_logits: bool = False,
        classify: bool = False,
    ) -> CheckedPrompt:
        """Tokenises and preprocesses a prompt; the rest goes into the result as it is.

        Raises:
          ValueError: it has the wrong form, or other images than placeholders.
          ImageError: an image cannot be read, or is too large.
          RequestTooLongError: it can never fit.
        """
        spec, scheduler = self._parts.spec, self._parts.core.scheduler
        processed = process_prompt(
            prompt,
            tokenizer=self._parts.tokenizer,
            pixels=self._parts.pixels,
            image_token=spec.image_token,
            image_token_id=spec.image_token_id,
            tokens_per_image=spec.tokens_per_image,
            vocab_size=spec.vocab_rows,
        )
        if len(processed.token_ids) + 1 > scheduler.max_request_tokens:
            raise RequestTooLongError(
                prompt_tokens=len(processed.token_ids),
                image_tokens=sum(image.length for image in processed.images),
                limit=scheduler.max_request_tokens,
            )
        if len(processed.images) > (slots := self._parts.core.images.slots):
            raise ValueError(
                f"the prompt has {len(processed.images)} images, the engine holds {slots} at once; "
                "raise EngineConfig.image_slots"
            )
        stops = len(params.stop_token_ids or ()) + len(self._parts.tokenizer.stop_token_ids)
        if params.min_tokens and stops > MAX_BANNED:
            raise ValueError(
                f"min_tokens={params.min_tokens} with {stops} stop tokens; at most {MAX_BANNED} "
                "can be held back, give fewer stop_token_ids"
            )
        text = prompt if isinstance(prompt, str) else prompt.get("prompt")
        return CheckedPrompt(
            text=text,
            processed=processed,
            params=params,
            keep_logits=keep_logits,
            classify=classify,
        )

    def make(self, checked: CheckedPrompt, adapters: list[AdapterRef | None]) -> Generation:
        """Makes the jobs of a prompt; `adapters` holds the same version once for each."""
        number, arrival_s = next(self._numbers), time.monotonic()
        return Generation(
            id=str(number),
            text=checked.text,
            jobs=[
                self._job(checked, i, adapter, f"{number}-{i}", arrival_s)
                for i, adapter in enumerate(adapters)
            ],
        )

    def _job(
        self,
        checked: CheckedPrompt,
        index: int,
        adapter: AdapterRef | None,
        request_id: str,
        arrival_s: float,
    ) -> Job:
        params = checked.params.for_sample(index)
        if params.seed is None:
            params = dataclasses.replace(params, seed=self._seeds.getrandbits(63))
        processed = checked.processed
        wants_scores = index == 0 and (checked.keep_logits or params.prompt_logprobs is not None)
        request = Request(
            id=request_id,
            prompt_token_ids=processed.token_ids,
            params=params,
            images=tuple(
                ImageSpan(content_hash=image.content_hash, start=image.start, length=image.length)
                for image in processed.images
            ),
            adapter=adapter,
            needs_prompt_logits=wants_scores,
            needs_classes=checked.classify,
            arrival_s=arrival_s,
        )
        room = self._parts.core.scheduler.max_request_tokens - len(processed.token_ids)
        scores = PromptScores(
            tokens=len(processed.token_ids),
            keep_logits=checked.keep_logits,
            number=params.prompt_logprobs,
        )
        return Job(
            request=request,
            pixels=[image.pixels_CHW for image in processed.images],
            answer=Answer(
                params,
                index=index,
                tokenizer=self._parts.tokenizer,
                end_tokens=self._parts.tokenizer.stop_token_ids,
                limit=min(params.max_tokens or room, room),
            ),
            scores=scores if wants_scores else None,
        )


def one_each(what: str, value: Any, number: int) -> list[Any]:
    """One value for all, or a sequence that has one for each."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * number
    if len(value) != number:
        raise ValueError(f"{what} has {len(value)} entries for {number} prompts; give one for each")
    return list(value)
