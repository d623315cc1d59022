"""Prompts of random tokens and images that nobody has brought before, ready for an engine."""

import numpy as np

from valora_jax.engine.generation import CheckedPrompt
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.engine.start import Parts
from valora_jax.media.prompts import ProcessedPrompt, PromptImage
from valora_jax.replay.arrivals import Arrival

_PICTURES = 8  # different ones; every image of a request counts as another nevertheless


class RandomPrompts:
    """Makes prompts of the lengths that a trace says."""

    def __init__(self, parts: Parts, *, seed: int):
        """`parts` are of the engine that will serve them."""
        self._spec, self._core = parts.spec, parts.core
        self._rng = np.random.default_rng(seed)
        shape = (_PICTURES, *parts.spec.pixel_shape)
        self._pictures_I3hw = self._rng.standard_normal(shape, np.float32)
        self._images = 0  # so far

    def make(self, arrival: Arrival) -> CheckedPrompt:
        """The prompt of a request: its images, then its text. Its answer ends by length alone.

        Raises:
          ValueError: it does not fit the engine, or has no room for its images.
        """
        spec = self._spec
        image_tokens = arrival.images * spec.tokens_per_image
        self._check(arrival, text=arrival.prompt_tokens - image_tokens)
        ids_T = self._rng.integers(0, spec.vocab_rows - 1, arrival.prompt_tokens - image_tokens)
        ids_T[ids_T >= spec.image_token_id] += 1
        return CheckedPrompt(
            text=None,
            processed=ProcessedPrompt(
                token_ids=(*[spec.image_token_id] * image_tokens, *ids_T.tolist()),
                images=tuple(self._image(nth) for nth in range(arrival.images)),
            ),
            params=SamplingParams(temperature=0, max_tokens=arrival.output_tokens, ignore_eos=True),
        )

    def _check(self, arrival: Arrival, *, text: int) -> None:
        limit, slots = self._core.scheduler.max_request_tokens, self._core.images.slots
        if text < 1:
            raise ValueError(
                f"a request of {arrival.prompt_tokens} prompt tokens has no room for "
                f"{arrival.images} images of {self._spec.tokens_per_image} and a text"
            )
        if (total := arrival.prompt_tokens + arrival.output_tokens) > limit:
            raise ValueError(
                f"a request of the trace has {total} tokens, the engine takes {limit}; raise "
                "--engine.max-request-tokens as far as the model and the memory allow"
            )
        if arrival.images > slots:
            raise ValueError(
                f"a request of the trace has {arrival.images} images, the engine holds {slots} at "
                f"once; give --engine.image-slots {arrival.images} or more"
            )

    def _image(self, nth: int) -> PromptImage:
        self._images += 1
        length = self._spec.tokens_per_image
        return PromptImage(
            pixels_CHW=self._pictures_I3hw[self._images % _PICTURES],
            content_hash=self._images.to_bytes(16),
            start=nth * length,
            length=length,
        )
