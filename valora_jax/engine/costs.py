"""What steps and merges cost on this device, learnt while serving.

A step's time is close to linear in what it does: a fixed part for reading the weights, one for each
decoding request, one for each prompt token; with LoRA a fixed part again, one for each rank page
that is read and one for each token that meets a rank page. `StepCosts` starts from the figures of
one device and follows those of its own; what the line misses it corrects for each mode and bucket.
"""

import dataclasses
import math
from collections.abc import Hashable

from valora_jax.lora.mode import Mode


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepLoad:
    """What decides a step's time.

    Attributes:
      bucket: the compiled shape.
      mode: how adapters are used.
      decodes: requests with one token.
      prompt_tokens: of longer chunks.
      pages: rank pages of a linear, of each distinct adapter that is added or subtracted.
      token_pages: the same of each token, summed over tokens.
    """

    bucket: Hashable
    mode: Mode
    decodes: int
    prompt_tokens: int
    pages: float
    token_pages: float

    def features(self) -> tuple[float, ...]:
        """As many as `StepTimes` has fields, in their order."""
        lora = 1.0 if self.pages else 0.0
        return (1.0, self.decodes, self.prompt_tokens, lora, self.pages, self.token_pages)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Milliseconds of a step: one term for each of `StepLoad.features`.

    The defaults are LLaVA-1.5-7B in bfloat16 on an H100 (docs/performance.md): steps of 8 and 32
    decodes of 800 tokens take 6.2 and 10 ms, a first token 20 ms; rank-64 adapters (4 pages) add
    0.44 ms when all share one, 1.2 and 4.2 ms when 8 and 32 requests bring one each, and about a
    sixth to prompts.
    """

    step_ms: float = 4.93
    decode_ms: float = 0.158
    prompt_token_ms: float = 0.0233
    lora_ms: float = 0.32
    page_ms: float = 0.029
    token_page_ms: float = 0.001

    def of(self, load: StepLoad) -> float:
        """Milliseconds of a step."""
        return sum(w * x for w, x in zip(dataclasses.astuple(self), load.features(), strict=True))


_BASE_TERMS = 3  # the first ones; the others are LoRA's
# On another device any term may be as large as all of a step here.
_USUAL_FEATURES = (1, 16, 640, 1, 32, 2560)
# One slow step, of a collected garbage or a busy host, says little about the next.
_LARGEST_SURPRISE = 0.5
_UNLIMITED_STEPS = 50  # as many at the start, when the first guess may be of another device
_NOISE = 0.05  # of a step's time
_DRIFT = 1e-4  # share of the first variances that returns with every step
_RATIO_RATE = 0.1
_RATIO_FADES_STEPS = 1000


class StepCosts:
    """Estimates the time of a step before it runs, and learns from those that ran.

    A Kalman filter over the terms of `StepTimes`, then a ratio for each mode and bucket, which is
    that of the mode where a bucket has none yet. The ratio of a mode that is not used fades away:
    otherwise one bad measurement could rule it out for good.
    """

    def __init__(self, first_guess: StepTimes | None = None, *, merge_ms: float = 10.0):
        """Starts from a guess that may be far off.

        Args:
          first_guess: of the terms.
          merge_ms: device time of folding an adapter into all linears.
        """
        self.merge_ms = merge_ms
        self._terms = list(dataclasses.astuple(first_guess or StepTimes()))
        whole_ms = self._terms[0]
        self._variances = [(3 * whole_ms / usual) ** 2 for usual in _USUAL_FEATURES]
        self._covariance = [
            [variance if i == j else 0.0 for j in range(len(self._terms))]
            for i, variance in enumerate(self._variances)
        ]
        # Mode and bucket, or the mode alone -> measured over estimated, and at which step.
        self._ratios: dict[tuple[Mode, Hashable] | Mode, tuple[float, int]] = {}
        self._steps = 0

    def estimate_ms(self, load: StepLoad) -> float:
        """Milliseconds that a step will take."""
        return self._line_ms(load) * self._ratio(load)

    def observe(self, load: StepLoad, ms: float) -> None:
        """Learns from a step that took `ms`, more than zero."""
        self._steps += 1
        predicted = self._line_ms(load)
        if self._steps > _UNLIMITED_STEPS:
            bound = _LARGEST_SURPRISE * predicted
            ms = min(max(ms, predicted - bound), predicted + bound)
        ratio = self._ratio(load)
        self._learn_terms(load.features(), ms)
        measured = ms / self._line_ms(load)
        self._ratios[load.mode, load.bucket] = (
            ratio + _RATIO_RATE * (measured - ratio),
            self._steps,
        )
        ratio = self._ratios.get(load.mode, (1.0, 0))[0]
        self._ratios[load.mode] = (ratio + _RATIO_RATE * (measured - ratio), self._steps)

    def observe_merge(self, ms: float) -> None:
        """Learns from a merge of all linears whose chunks took `ms` together."""
        self.merge_ms += 0.3 * (ms - self.merge_ms)

    def _ratio(self, load: StepLoad) -> float:
        of_mode = self._ratios.get(load.mode, (1.0, 0))
        ratio, seen = self._ratios.get((load.mode, load.bucket), of_mode)
        return 1 + (ratio - 1) * math.exp((seen - self._steps) / _RATIO_FADES_STEPS)

    def _line_ms(self, load: StepLoad) -> float:
        parts = [w * x for w, x in zip(self._terms, load.features(), strict=True)]
        base, extra = sum(parts[:_BASE_TERMS]), sum(parts[_BASE_TERMS:])
        # Noise may turn a small term negative; LoRA never makes a step quicker.
        return max(base, 1e-3) + max(extra, 0.0)

    def _learn_terms(self, x: tuple[float, ...], ms: float) -> None:
        covariance = self._covariance
        px = [sum(c * f for c, f in zip(row, x, strict=True)) for row in covariance]
        noise = (_NOISE * ms) ** 2
        scale = 1 / (sum(p * f for p, f in zip(px, x, strict=True)) + noise)
        surprise = ms - sum(w * f for w, f in zip(self._terms, x, strict=True))
        self._terms = [w + p * scale * surprise for w, p in zip(self._terms, px, strict=True)]
        for i, row in enumerate(covariance):
            gain = px[i] * scale
            covariance[i] = row = [c - gain * p for c, p in zip(row, px, strict=True)]
            if row[i] < self._variances[i]:  # a term that no step shows must not become unknown
                row[i] += _DRIFT * self._variances[i]
