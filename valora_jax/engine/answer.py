"""One answer as it grows: tokens in, text out, and when it ends.

K the most log-probabilities.
"""

import dataclasses
from collections.abc import Collection

import numpy as np

from valora_jax.engine.outputs import CompletionOutput, Logprob
from valora_jax.engine.request import FinishReason
from valora_jax.engine.sampler import Sampled
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.media.detokenizer import IncrementalDetokenizer
from valora_jax.media.stop_strings import StopStrings
from valora_jax.media.tokenizer import Tokenizer


def logprobs_of(
    sampled: Sampled, row: int, *, number: int, tokenizer: Tokenizer
) -> dict[int, Logprob]:
    """The `number` likeliest tokens of a row, and the one taken, by token id."""
    taken, logprobs = int(sampled.token_S[row]), sampled.logprobs
    assert logprobs is not None  # whoever wants some is not sampled without
    found = {
        taken: Logprob(
            logprob=float(logprobs.logprob_S[row]),
            rank=int(logprobs.rank_S[row]),
            decoded_token=tokenizer.token_text(taken),
        )
    }
    for k in range(number):
        token = int(logprobs.top_token_SK[row, k])
        found.setdefault(
            token,
            Logprob(
                logprob=float(logprobs.top_logprob_SK[row, k]),
                rank=k + 1,
                decoded_token=tokenizer.token_text(token),
            ),
        )
    return found


class Answer:
    """Text, log-probabilities and the end of one answer."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        index: int,
        tokenizer: Tokenizer,
        end_tokens: Collection[int],
        limit: int,
    ):
        """Args:
        end_tokens: the model's own, which `ignore_eos` ignores.
        limit: tokens after which it is cut.
        """
        self._params, self._index, self._tokenizer, self._limit = params, index, tokenizer, limit
        self._end_tokens = frozenset(() if params.ignore_eos else end_tokens)
        self._stop_tokens = frozenset(params.stop_token_ids or ())
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=params.skip_special_tokens
        )
        self._stops = StopStrings(
            params.stop_strings, include_in_output=params.include_stop_str_in_output
        )
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative = 0.0
        self._stop_reason: str | int | None = None
        self.finish_reason: FinishReason | None = None

    def add(self, sampled: Sampled, row: int) -> FinishReason | None:
        """Takes the token of a row; returns why the answer ends, if it does."""
        token = int(sampled.token_S[row])
        self._tokens.append(token)
        if (number := self._params.logprobs) is not None:
            found = logprobs_of(sampled, row, number=number, tokenizer=self._tokenizer)
            self._logprobs.append(found)
            self._cumulative += found[token].logprob
        may_stop = len(self._tokens) >= self._params.min_tokens
        if may_stop and token in self._end_tokens | self._stop_tokens:
            self._stop_reason = None if token in self._end_tokens else token
            if self._params.include_stop_str_in_output:
                self._text.append(self._stops.add(self._detokenizer.add(token)))
            return self.end("stop")
        text = self._detokenizer.add(token)
        self._text.append(self._stops.add(text) if may_stop else text)
        if self._stops.matched is not None:
            self._stop_reason = self._stops.matched
            return self.end("stop")
        return self.end("length") if len(self._tokens) >= self._limit else None

    def end(self, reason: FinishReason) -> FinishReason:
        """Ends the answer, for whatever reason; its text is whole then."""
        if self._stops.matched is None:
            self._text.append(self._stops.add(self._detokenizer.finish()))
        if self._stops.matched is None:
            self._text.append(self._stops.finish())
        elif reason == "length":
            reason, self._stop_reason = "stop", self._stops.matched
        self.finish_reason = reason
        return reason

    def output(self) -> CompletionOutput:
        """The answer as far as it has come."""
        wants = self._params.logprobs is not None
        self._text = ["".join(self._text)]
        return CompletionOutput(
            index=self._index,
            text=self._text[0],
            token_ids=list(self._tokens),
            logprobs=list(self._logprobs) if wants else None,
            cumulative_logprob=self._cumulative if wants else None,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )


@dataclasses.dataclass(kw_only=True, slots=True)
class PromptScores:
    """What a prompt's tokens scored, collected chunk by chunk.

    Attributes:
      tokens: of the prompt.
      keep_logits: collect `logits`, too.
      number: likeliest tokens in each of `logprobs`; None collects none.
      logits: one block `[tokens, V]` a chunk.
      logprobs: for each prompt token, None for the first.
    """

    tokens: int
    keep_logits: bool
    number: int | None
    logits: list[np.ndarray] = dataclasses.field(default_factory=list)
    logprobs: list[dict[int, Logprob] | None] = dataclasses.field(default_factory=lambda: [None])
    _seen: int = 0

    def add(
        self,
        logits_TV: np.ndarray,
        following: Sampled,
        *,
        row: int,
        position: int,
        length: int,
        tokenizer: Tokenizer,
    ) -> None:
        """Takes a chunk that starts at `row` of the step and `position` of the request.

        A preempted request computes its prompt again; what was seen is not taken twice.
        """
        first, stop = max(position, self._seen), min(position + length, self.tokens)
        if first >= stop:
            return
        self._seen = stop
        rows = range(row + first - position, row + stop - position)
        if self.keep_logits:
            self.logits.append(logits_TV[rows.start : rows.stop])
        if self.number is not None:
            followed = rows[: self.tokens - 1 - first]
            self.logprobs += [
                logprobs_of(following, r, number=self.number, tokenizer=tokenizer) for r in followed
            ]
