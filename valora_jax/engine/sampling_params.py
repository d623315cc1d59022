"""How the tokens of one request are chosen, with vLLM's field names and defaults.

Every field is checked when the object is made, types included (True is not an integer, NaN is not
a temperature), and all faults are reported at once.
"""

import dataclasses
import hashlib
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeGuard, cast

MAX_LOGPROBS = 20
# Below this a temperature is taken as zero: logits divided by it leave float32's useful range.
GREEDY_TEMPERATURE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling of one request; the same for all its `n` answers but for the seed.

    Attributes:
      n: answers to generate for the prompt.
      temperature: divides the logits; 0 takes the likeliest token.
      top_p: keeps the likeliest tokens whose probabilities reach this sum, in (0, 1].
      top_k: keeps this many of the likeliest tokens; 0 or -1 keeps all (stored as 0).
      min_p: drops tokens less likely than this fraction of the likeliest one, in [0, 1].
      presence_penalty: subtracted once from the logit of a token already generated.
      frequency_penalty: subtracted as often as the token was generated.
      repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or
        answer.
      seed: makes the answer reproducible; None draws one.
      stop: one string or several at which the answer ends.
      stop_token_ids: tokens at which the answer ends.
      ignore_eos: goes on after the model's end token.
      max_tokens: most tokens to generate; None goes on to the engine's limit.
      min_tokens: tokens to generate before anything may end the answer.
      logprobs: log-probabilities of this many likeliest tokens, and of the one taken.
      prompt_logprobs: the same for every token of the prompt.
      skip_special_tokens: leaves special tokens out of the text.
      include_stop_str_in_output: keeps the stop string in the text.

    Raises:
      ValueError: a field has the wrong type or is out of range; lists every fault.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        if faults := list(self._faults()):
            raise ValueError("\n  ".join(["the sampling parameters are wrong:", *faults]))
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stops)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "top_k", max(self.top_k, 0))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, so that nothing is drawn."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` in the one form in which it is stored."""
        return cast(tuple[str, ...], self.stop)

    def for_sample(self, index: int) -> "SamplingParams":
        """The parameters of one of the `n` answers, with n=1 and a seed of its own.

        Answer 0 keeps the seed, so it is the answer that n=1 gives. The others' seeds are hashed,
        so that they do not meet those of a request with the next seed.
        """
        if not 0 <= index < self.n:
            raise ValueError(f"index={index} of n={self.n} answers; give one in [0, {self.n})")
        seed = self.seed
        if seed is not None and index > 0:
            digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
            seed = int.from_bytes(digest, "little", signed=True)
        return dataclasses.replace(self, n=1, seed=seed)

    def _faults(self) -> Iterator[str]:
        for name, allowed in _NUMBERS.items():
            value = getattr(self, name)
            if not (value is None and allowed.optional) and not allowed.admits(value):
                yield f"{name}={value!r}, want {allowed}"
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(value := getattr(self, name), bool):
                yield f"{name}={value!r}, want True or False"
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if not _is_list_of(stops, lambda s: isinstance(s, str) and s != ""):
            yield f"stop={self.stop!r}, want a non-empty string, a list of them or None"
        if not _is_list_of(self.stop_token_ids, lambda t: _is_integer(t) and 0 <= t <= _MAX_INT32):
            yield f"stop_token_ids={self.stop_token_ids!r}, want a list of token ids or None"
        most, least = self.max_tokens, self.min_tokens
        if _is_integer(most) and _is_integer(least) and least > most:
            yield f"min_tokens={least} exceeds max_tokens={most}; raise max_tokens"
        if _is_integer(self.n) and self.n > 1 and _is_number(self.temperature) and self.greedy:
            yield f"n={self.n} greedy answers would be equal; set n=1, or raise the temperature"


@dataclasses.dataclass(frozen=True, slots=True)
class _Numbers:
    """Numbers from `low` to `high`, both included unless `above_low`; NaN is none of them."""

    kind: Literal["integer", "number"]
    low: float
    high: float
    above_low: bool = False
    optional: bool = False

    def admits(self, value: Any) -> bool:
        right_type = _is_integer(value) if self.kind == "integer" else _is_number(value)
        return (
            right_type
            and (self.low < value if self.above_low else self.low <= value)
            and value <= self.high
        )

    def __str__(self) -> str:
        kind = "an integer" if self.kind == "integer" else "a number"
        low = f"> {self.low}" if self.above_low else f">= {self.low}"
        return f"{kind} {low} and <= {self.high}{' or None' if self.optional else ''}"


# What the device can hold.
_MAX_INT32 = 2**31 - 1
_MAX_FLOAT32 = 3.4e38

_NUMBERS = {
    "n": _Numbers("integer", 1, _MAX_INT32),
    "temperature": _Numbers("number", 0, _MAX_FLOAT32),
    "top_p": _Numbers("number", 0, 1, above_low=True),
    "top_k": _Numbers("integer", -1, _MAX_INT32),
    "min_p": _Numbers("number", 0, 1),
    "presence_penalty": _Numbers("number", -2, 2),
    "frequency_penalty": _Numbers("number", -2, 2),
    "repetition_penalty": _Numbers("number", 0, _MAX_FLOAT32, above_low=True),
    "seed": _Numbers("integer", -(2**63), 2**63 - 1, optional=True),
    "max_tokens": _Numbers("integer", 1, _MAX_INT32, optional=True),
    "min_tokens": _Numbers("integer", 0, _MAX_INT32),
    "logprobs": _Numbers("integer", 0, MAX_LOGPROBS, optional=True),
    "prompt_logprobs": _Numbers("integer", 0, MAX_LOGPROBS, optional=True),
}


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_list_of(value: Any, admits: Callable[[Any], bool]) -> bool:
    """None counts as an empty list; a string or bytes as no list."""
    if value is None:
        return True
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and all(admits(item) for item in value)
    )
