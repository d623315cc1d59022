"""What steps and merges cost on this device, learnt while serving.

A step's time is close to linear in what it does: a fixed part for reading the weights, one for each
decoding request, one for prompts, one for each of their tokens and one for each image that is
encoded first; with LoRA a fixed part again, one for prompts, one for each rank page that is read,
one for each token that meets a rank page, and one for a mixture. `StepCosts` starts from the
figures of one device and follows those of its own; what the line misses it corrects for each
compiled shape.
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from valora_jax.lora.mode import Mode


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepLoad:
    """What decides a step's time.

    Attributes:
      bucket: the compiled shape.
      mode: how adapters are used.
      decodes: requests with one token.
      prompt_tokens: of longer chunks.
      images: encoded for the step, before it.
      pages: rank pages of a linear, of each distinct adapter that is added or subtracted.
      token_pages: the same of each token, summed over tokens.
    """

    bucket: Hashable
    mode: Mode
    decodes: int
    prompt_tokens: int
    images: int
    pages: float
    token_pages: float

    def features(self) -> tuple[float, ...]:
        """As many as `StepTimes` has fields, in their order."""
        lora = self.pages > 0
        return (
            1.0,
            self.decodes,
            float(self.prompt_tokens > 0),
            self.prompt_tokens,
            self.images,
            float(lora),
            float(lora and self.prompt_tokens > 0),
            self.pages,
            self.token_pages,
            float(self.mode is Mode.MIXTURE),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Milliseconds of a step: one term for each of `StepLoad.features`.

    The defaults are LLaVA-1.5-7B in bfloat16 on an H100 (docs/performance.md): steps of 8 and 32
    decodes of 800 tokens take 6.2 and 10 ms, 4,096 tokens of prompts 71 ms, and an image 5 ms more,
    the host's part of it included; rank-64 adapters (4 pages) add 0.44 ms when all share one, 1.2
    and 4.2 ms when 8 and 32 requests bring one each, 3 ms to steps with prompts, and a mixture
    takes 0.44 ms more than an unmerged step that reads as many pages.
    """

    step_ms: float = 4.93
    decode_ms: float = 0.158
    prompt_ms: float = 0.0
    prompt_token_ms: float = 0.0162
    image_ms: float = 5.0
    lora_ms: float = 0.32
    prompt_lora_ms: float = 2.0
    page_ms: float = 0.029
    token_page_ms: float = 0.0002
    mixture_ms: float = 0.44

    def of(self, load: StepLoad) -> float:
        """Milliseconds of a step."""
        return sum(w * x for w, x in zip(dataclasses.astuple(self), load.features(), strict=True))


class _Prior(NamedTuple):
    """What is believed of a term before it is seen.

    Attributes:
      usual: its feature in a usual step.
      deviation: how far off it may be there, in steps.
      forgets: share of what is known of it that goes with every step.
    """

    usual: float
    deviation: float
    forgets: float


# On another device a term of the base may be as large as some steps here, and one of LoRA's as a
# part of one: where all steps use LoRA they do not tell its share from the base's. Of the base
# hardly anything is forgotten: with its wide deviations 1e-4 made the line follow the load of the
# last seconds, and be off for all others. Half of LoRA's goes in 70,000 steps: while all steps use
# it, only the guess tells it from the base. Of what a mixture takes on top it goes in 350: what
# looks bad is to be tried again.
_PRIORS = {
    "step_ms": _Prior(1, 3.0, 1e-6),
    "decode_ms": _Prior(16, 3.0, 1e-6),
    "prompt_ms": _Prior(1, 3.0, 1e-6),
    "prompt_token_ms": _Prior(640, 3.0, 1e-6),
    "image_ms": _Prior(1, 3.0, 1e-6),
    "lora_ms": _Prior(1, 1.0, 1e-5),
    "prompt_lora_ms": _Prior(1, 0.3, 1e-5),
    "page_ms": _Prior(32, 0.3, 1e-5),
    "token_page_ms": _Prior(2560, 0.3, 1e-5),
    "mixture_ms": _Prior(1, 0.3, 2e-3),
}
_BASE_TERMS = 5  # the first ones; the others are LoRA's
# What the line misses in one compiled shape: factors of the base, of LoRA, and of LoRA once more in
# a mixture; how far off they may be, and what is forgotten of them, half in 35 steps.
_FACTORS, _FACTOR_DEVIATIONS, _FACTORS_FORGET = (1.0, 1.0, 0.0), (0.15, 0.3, 0.3), (0.02,) * 3
# One slow step, of a collected garbage or a busy host, says little about the next.
_LARGEST_SURPRISE = 0.1
_MERGE_SURPRISE = 2.0  # and no merge takes a multiple of the others, or next to nothing
_UNLIMITED_STEPS = 50  # as many at the start, when the first guess may be of another device
_NOISE = 0.05  # of a step's time
# Of the guess. Steps that all use LoRA may hide what it takes, and would be all there ever are.
_LEAST_LORA = 0.3
_BENDS = 3.0  # how much less reliable a shape off the line is, in units of the distance


class _Line:
    """Weights of a sum, learnt from sums by least squares that return to a guess in time.

    Attributes:
      guess: of the weights, before anything was learnt.
      weights: as known now.
    """

    def __init__(
        self, guess: Sequence[float], deviations: Sequence[float], *, forgets: Sequence[float]
    ):
        """Starts from a guess.

        Args:
          guess: of the weights.
          deviations: how far off each may be.
          forgets: which share of what is known of each goes whenever something is learnt.
        """
        self.guess, self.weights = tuple(guess), list(guess)
        self._keeps = [math.sqrt(1 - share) for share in forgets]
        variances = [deviation**2 for deviation in deviations]
        self._returns = [share * v for share, v in zip(forgets, variances, strict=True)]
        self._covariance = [
            [variance if i == j else 0.0 for j in range(len(self.weights))]
            for i, variance in enumerate(variances)
        ]

    def variance(self, x: Sequence[float]) -> float:
        """How far off the sum of features `x` may be, squared."""
        return sum(
            f * sum(c * g for c, g in zip(row, x, strict=True))
            for f, row in zip(x, self._covariance, strict=True)
        )

    def learn(self, x: Sequence[float], y: float, *, variance: float) -> None:
        """Learns from features `x` whose weighted sum is `y`, give or take the variance's root."""
        self._forget()
        covariance = self._covariance
        px = [sum(c * f for c, f in zip(row, x, strict=True)) for row in covariance]
        scale = 1 / (sum(p * f for p, f in zip(px, x, strict=True)) + variance)
        surprise = y - sum(w * f for w, f in zip(self.weights, x, strict=True))
        self.weights = [w + p * scale * surprise for w, p in zip(self.weights, px, strict=True)]
        self._covariance = [
            [c - p * scale * q for c, q in zip(row, px, strict=True)]
            for row, p in zip(covariance, px, strict=True)
        ]

    def _forget(self) -> None:
        """Moves towards the guess, so that what no step shows any more cannot stay wrong."""
        keeps = self._keeps
        self.weights = [
            guess + keep * (w - guess)
            for w, guess, keep in zip(self.weights, self.guess, keeps, strict=True)
        ]
        for i, row in enumerate(self._covariance):
            row[:] = [keeps[i] * keep * c for c, keep in zip(row, keeps, strict=True)]
            row[i] += self._returns[i]


class StepCosts:
    """Estimates of this device's times, from its steps so far; any device becomes known.

    A line through all steps, and factors for each compiled shape. The modes share both, so that
    comparing two of them compares what they do and not how often each was seen. Factors return to
    one where no step shows them: a mode that looks bad once is tried again, and one that looks good
    only because the other was never seen does not for long.
    """

    def __init__(self, first_guess: StepTimes | None = None, *, merge_ms: float = 10.0):
        """Starts from a guess that may be far off.

        Args:
          first_guess: of the terms.
          merge_ms: device time of folding an adapter into all linears.
        """
        self.merge_ms = merge_ms
        self._line = _line_of(dataclasses.astuple(first_guess or StepTimes()))
        self._factors: dict[Hashable, _Line] = {}
        self._steps = 0

    def estimate_ms(self, load: StepLoad) -> float:
        """Milliseconds that a step will take."""
        line = self._factors.get(load.bucket)
        of_base, *of_lora = _FACTORS if line is None else line.weights
        base_ms, *lora_ms = self._parts_ms(load)
        extra_ms = sum(w * x for w, x in zip(of_lora, lora_ms, strict=True))
        # Noise may turn a small term negative; LoRA never makes a step quicker.
        return max(of_base * base_ms, 1e-3) + max(extra_ms, 0.0)

    def observe(self, load: StepLoad, ms: float) -> None:
        """Learns from a step that took `ms`, more than zero."""
        self._steps += 1
        predicted = self.estimate_ms(load)
        if self._steps == 1:  # how fast a device is, it is with LoRA, too
            self._line = _line_of([w * ms / predicted for w in self._line.weights])
        if self._steps > _UNLIMITED_STEPS:
            bound = _LARGEST_SURPRISE * predicted
            ms = min(max(ms, predicted - bound), predicted + bound)
        noise = (_NOISE * ms) ** 2
        # While the line is not known, what it misses is not the shape's.
        unknown = self._line.variance(load.features())
        # Shapes that are known to be off the line do not bend it.
        off_ms = predicted - sum(self._parts_ms(load)[:2])
        self._line.learn(load.features(), ms, variance=noise + (_BENDS * off_ms) ** 2)
        if load.bucket not in self._factors:
            self._factors[load.bucket] = _Line(
                _FACTORS, _FACTOR_DEVIATIONS, forgets=_FACTORS_FORGET
            )
        self._factors[load.bucket].learn(self._parts_ms(load), ms, variance=noise + unknown)

    def observe_merge(self, ms: float) -> None:
        """Learns from a merge of all linears whose chunks took `ms` together."""
        # It is what steps took longer than estimated: errors of estimates add up in it.
        bounded_ms = min(max(ms, self.merge_ms / _MERGE_SURPRISE), self.merge_ms * _MERGE_SURPRISE)
        self.merge_ms += 0.3 * (bounded_ms - self.merge_ms)

    def _parts_ms(self, load: StepLoad) -> tuple[float, float, float]:
        """On the line: the base, LoRA, and this again in a mixture; for the factors, in order."""
        x = load.features()
        parts = [w * f for w, f in zip(self._line.weights, x, strict=True)]
        guessed = [w * f for w, f in zip(self._line.guess, x, strict=True)]
        base_ms = max(sum(parts[:_BASE_TERMS]), 1e-3)
        lora_ms = max(sum(parts[_BASE_TERMS:]), _LEAST_LORA * sum(guessed[_BASE_TERMS:]))
        return base_ms, lora_ms, lora_ms if load.mode is Mode.MIXTURE else 0.0


def _line_of(terms: Sequence[float]) -> _Line:
    priors = [_PRIORS[field.name] for field in dataclasses.fields(StepTimes)]
    deviations = [terms[0] * prior.deviation / prior.usual for prior in priors]
    return _Line(terms, deviations, forgets=[prior.forgets for prior in priors])
