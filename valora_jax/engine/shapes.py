"""What steps are compiled for on this device: buckets, each with and without adapters."""

import functools
import itertools
from collections.abc import Iterator

import jax
import numpy as np

from pallas_kernels.lora_matmul import Implementation as Kernel
from valora_jax.config import EngineConfig, Kernels
from valora_jax.engine.batch import BatchLayout
from valora_jax.engine.buckets import Bucket, Buckets
from valora_jax.engine.precision import SEVERAL_ROWS, Precision
from valora_jax.engine.step import ModelShape, StepShape
from valora_jax.models.spec import ModelSpec

IMAGES_A_CALL = (1, 2, 4)


def kernel_of(kernels: Kernels) -> Kernel:
    """Resolves "auto" for the device that jax uses by default.

    Raises:
      NotImplementedError: the kernels do not run on it.
    """
    platform = jax.default_backend()
    if kernels == "triton" and platform != "gpu":
        raise NotImplementedError(
            f'kernels="triton" runs on NVIDIA GPUs only, and jax runs on {platform!r} here; '
            'set kernels="auto" or "xla", or install jax for CUDA'
        )
    if kernels == "auto":
        return "triton" if platform == "gpu" else "xla"
    return kernels


class StepShapes:
    """Hands out the same object for the same shape; each is a compilation.

    Attributes:
      kernel: which implementation of LoRA, attention and merging runs.
    """

    def __init__(
        self,
        model: ModelShape,
        spec: ModelSpec,
        config: EngineConfig,
        *,
        max_tokens_per_step: int,
        precision: Precision,
        request_pages: int,
        with_adapters: bool,
    ):
        """Args:
        max_tokens_per_step: the configured number, or the default where there is none.
        request_pages: pages that the longest request takes.
        with_adapters: whether the engine serves any.

        Raises:
          NotImplementedError: see `kernel_of`.
        """
        platform = jax.default_backend()
        self._buckets = Buckets(
            max_requests=config.max_requests,
            max_tokens_per_step=max_tokens_per_step,
            tokens_per_image=spec.tokens_per_image,
            spacing="coarse" if platform == "cpu" else "fine",
        )
        self.kernel: Kernel = kernel_of(config.kernels)
        self._model, self._spec, self._precision = model, spec, precision
        self._request_pages = request_pages
        # With nobody's adapter in it, a step without LoRA saves launches; on a CPU it saves nothing
        # worth compiling every shape twice for.
        self._lora_variants = (False,)
        if with_adapters:
            self._lora_variants = (True,) if platform == "cpu" else (False, True)

    def step(self, bucket: Bucket, *, with_lora: bool) -> StepShape:
        """A step, with adapters if it needs them, or always where there is no other."""
        return self._step(bucket, with_lora or self._lora_variants[0])

    def scores(self, dtype: np.dtype, *, with_lora: bool) -> StepShape:
        """The scoring of a block of rows, which come in a step's dtype."""
        return self._scores(dtype, with_lora or self._lora_variants[0])

    def images(self, images: int, *, with_lora: bool) -> StepShape:
        """The encoding of images."""
        return self._images(images, with_lora or self._lora_variants[0])

    def choose(self, *, decodes: int, prompt_tokens: int) -> Bucket:
        """See `Buckets.choose`."""
        return self._buckets.choose(decodes=decodes, prompt_tokens=prompt_tokens)

    def layout(self, bucket: Bucket) -> BatchLayout:
        """The fields of a bucket's steps, the same in all variants."""
        return self._layout(bucket)

    @functools.lru_cache  # noqa: B019 (lives as long as its engine)
    def rows(self, rows: int) -> BatchLayout:
        """The fields of so many sampled rows, with which a step's buffer begins."""
        return BatchLayout.of_rows(rows)

    def all_steps(self) -> Iterator[tuple[Bucket, StepShape]]:
        """Every step there is."""
        for bucket, with_lora in itertools.product(self._buckets, self._lora_variants):
            yield bucket, self._step(bucket, with_lora)

    def all_images(self) -> Iterator[tuple[int, StepShape]]:
        """Every encoding there is, with the number of images."""
        for images, with_lora in itertools.product(IMAGES_A_CALL, self._lora_variants):
            yield images, self._images(images, with_lora)

    @functools.lru_cache  # noqa: B019 (lives as long as its engine)
    def _layout(self, bucket: Bucket) -> BatchLayout:
        return BatchLayout.of(bucket, request_pages=self._request_pages)

    @functools.lru_cache  # noqa: B019
    def _step(self, bucket: Bucket, with_lora: bool) -> StepShape:
        if bucket.chunks:
            dtype = self._precision.prompts
        elif bucket.decodes >= SEVERAL_ROWS:
            dtype = self._precision.decodes
        else:
            dtype = self._precision.weights
        return self._shape(self._layout(bucket), dtype, with_lora=with_lora)

    @functools.lru_cache  # noqa: B019
    def _scores(self, dtype: np.dtype, with_lora: bool) -> StepShape:
        return self._shape(BatchLayout.of_scores(), dtype, with_lora=with_lora)

    @functools.lru_cache  # noqa: B019
    def _images(self, images: int, with_lora: bool) -> StepShape:
        layout = BatchLayout.of_images(images, vision_tokens=self._spec.vision_tokens_per_image)
        return self._shape(layout, self._precision.prompts, with_lora=with_lora)

    def _shape(self, layout: BatchLayout, dtype, *, with_lora: bool) -> StepShape:
        return StepShape(
            model=self._model,
            layout=layout,
            with_lora=with_lora,
            dtype=dtype,
            kernel=self.kernel,
        )
