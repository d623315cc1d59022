"""What a request gives back, in vLLM's form."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from valora_jax.engine.request import FinishReason
from valora_jax.lora.host_store import AdapterRef


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Logprob:
    """Log-probability of one token at one position; rank 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CompletionOutput:
    """One answer, as far as it has come.

    Attributes:
      index: which of the `n` answers.
      text: without what a stop string cut off.
      token_ids: all tokens, those that ended the answer included.
      logprobs: for each token, log-probabilities by token id; None if not asked for.
      cumulative_logprob: sum over the tokens taken; None like `logprobs`.
      finish_reason: None while unfinished.
      stop_reason: the stop string or token id that ended the answer; None for the end token.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RequestMetrics:
    """Times on the engine's clock; None for what has not happened yet."""

    arrival_s: float
    first_token_s: float | None = None
    finished_s: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """A prompt and its answers.

    Attributes:
      prompt: as text; None where token ids were given.
      prompt_token_ids: placeholders of images expanded.
      prompt_logprobs: for each prompt token, None for the first; None if not asked for.
      outputs: `n` of them, by index.
      finished: all of them are.
      adapter: the version that answered; None for the base model.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: Sequence[dict[int, Logprob] | None] | None = None
    adapter: AdapterRef | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationOutput:
    """What an adapter's task head says of a prompt.

    Attributes:
      logits: one number a class, in the order of the head's rows.
      probs: their softmax.
    """

    prompt_token_ids: Sequence[int]
    logits: Sequence[float]
    probs: Sequence[float]
    adapter: AdapterRef

    @classmethod
    def of(cls, output: "RequestOutput", logits_C: np.ndarray) -> "ClassificationOutput":
        """The answer to a prompt that ran under an adapter, from the logits of its classes."""
        assert output.adapter is not None
        exp_C = np.exp(logits_C - logits_C.max())
        return cls(
            prompt_token_ids=output.prompt_token_ids,
            logits=logits_C.tolist(),
            probs=(exp_C / exp_C.sum()).tolist(),
            adapter=output.adapter,
        )
