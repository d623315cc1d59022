"""Times the engine's own compiled step on a GPU at the real size of LLaVA-1.5-7B.

Run it as `python -m benchmarks.decode_step`. Weights are random, so no checkpoint is needed.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import decode_inputs, floors
from benchmarks.decode_inputs import ADAPTERS, DTYPE, RANK, Batch, Weights
from benchmarks.floors import Work
from benchmarks.gpu import Options, Program, Recorder, require_gpu, run_group
from pallas_kernels.tuning.shapes import MODELS, ModelShape
from valora_jax.engine import step
from valora_jax.engine.batch import BatchLayout
from valora_jax.models.llava15.config import LLAVA_1_5_7B
from valora_jax.models.llava15.spec import spec_of
from valora_jax.models.spec import ModelSpec

MODEL, CONTEXT = "llava-1.5-7b", 800
PROMPT = 576 + 64  # an image and a short text
# Back to back, as the engine enqueues them.
STEPS = dict(samples=5, sample_runs=20)
# Alone, from an idle device to its end.
ALONE = dict(samples=15, sample_runs=1, sample_ms=0)


class Bench:
    """Weights and adapters, which all programs share."""

    def __init__(self, spec: ModelSpec, shape: ModelShape):
        self.spec, self._shape = spec, shape
        self._weights = Weights(spec)
        self._adapters = decode_inputs.adapter_arrays(spec)
        self._step_shape = functools.cache(self._make_step_shape)
        self._run = functools.cache(self._make_run)

    def program(self, name: str, batch: Batch, *, impl: str, lora: bool, **more: Any) -> Program:
        """A step of a batch; with `lora` and no adapters, the rows bring none to a step for some.

        `name` is followed by the adapters and the implementation.
        """
        whose = {batch.requests: "each", 1: "one", 0: "unused" if lora else "none"}[batch.adapters]
        with_image = name == "first-token"
        step_shape = self._step_shape(bucket_of=_with_adapters(batch, 0), impl=impl, lora=lora)
        return Program(
            name=f"{name}/{whose}/{impl}",
            fields=dict(
                model=MODEL,
                op=name.split("/")[0],
                batch=batch.requests,
                tokens=batch.tokens,
                kv_tokens=batch.kv_tokens,
                adapters=batch.adapters,
                lora=whose,
                rank=RANK if batch.adapters else 0,
                impl=impl,
            ),
            work=self._work(batch, with_image=with_image),
            run=self._run(step_shape, with_image=with_image),
            carry=functools.partial(decode_inputs.carry, self.spec, batch),
            inputs=lambda: (
                self._weights.leaves,
                self._adapters if lora else None,
                decode_inputs.packed(self.spec, batch),
                self._images(batch) if with_image else None,
            ),
            calls=1,
            error=_unless_finite,
            timing=more,
            compiler_options=step.compiler_options(step_shape),
        )

    def _make_step_shape(
        self, *, impl: str, lora: bool, bucket_of: Batch | None = None
    ) -> step.StepShape:
        """Of a batch, or of one image."""
        layout = decode_inputs.layout(self.spec, bucket_of) if bucket_of else self._image_layout
        return step.StepShape(
            model=self._weights.shape,
            layout=layout,
            with_lora=lora,
            dtype=np.dtype(DTYPE),
            kernel=impl,
        )

    def _make_run(
        self, step_shape: step.StepShape, *, with_image: bool
    ) -> Callable[..., tuple[Any, Any]]:
        """The function to compile, one and the same for batches of one shape."""
        image_shape = self._step_shape(impl=step_shape.kernel, lora=step_shape.with_lora)

        def run(carry, leaves, adapters, packed, images):
            kv, state, features_FD = carry
            if with_image:
                features_FD = step.encode_images(
                    image_shape, leaves, features_FD, adapters, *images
                )
            kv, state, outputs = step.decoder_step(
                step_shape, leaves, kv, state, features_FD, adapters, packed
            )
            return (kv, state, features_FD), outputs

        return run

    @property
    def _image_layout(self) -> BatchLayout:
        return BatchLayout.of_images(1, vision_tokens=self.spec.vision_tokens_per_image)

    def _images(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """One image for the first slot."""
        packed, fields = self._image_layout.buffer()
        fields["adapter"][:] = 0 if batch.adapters else -1
        return jnp.ones((1, *self.spec.pixel_shape), DTYPE), jax.device_put(packed)

    def _work(self, batch: Batch, *, with_image: bool) -> Work:
        """Of a step: linears, attention, adapters, the head, and the tower where there is one."""
        shape, T = self._shape, batch.requests * batch.tokens
        layer = floors.attention(
            tokens=batch.tokens,
            kv_tokens=batch.kv_tokens,
            requests=batch.requests,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_width=shape.head_width,
        )
        for width, columns in shape.linears.values():
            layer += floors.linear(tokens=T, weights=width * sum(columns))
            ranks = (RANK,) * batch.adapters
            layer += floors.adapters(tokens=T, ranks=ranks, width=width, columns=columns)
        head = floors.linear(tokens=batch.requests, weights=shape.width * self.spec.vocab_rows)
        work = layer * shape.layers + head
        if with_image:
            tower = LLAVA_1_5_7B.vision
            weights = tower.width * (4 * tower.width + 2 * tower.mlp_width)
            vision = floors.linear(tokens=self.spec.vision_tokens_per_image, weights=weights)
            work += vision * LLAVA_1_5_7B.vision_blocks_used
        return work


def _with_adapters(batch: Batch, adapters: int) -> Batch:
    return Batch(
        requests=batch.requests,
        tokens=batch.tokens,
        kv_tokens=batch.kv_tokens,
        adapters=adapters,
    )


def _unless_finite(returned: tuple[Any, step.StepOutputs]) -> float:
    """Random weights have no right answer, but a wrong read shows as NaN sooner or later."""
    return 0.0 if bool(jnp.isfinite(returned[1].logits_SV).all()) else float("nan")


def groups(bench: Bench, options: Options) -> Iterator[Iterator[Program]]:
    """The goals' rows first; each group is a batch of one shape."""
    for requests in (8, 32) if options.quick else (8, 32, 1, 64):
        yield _decodes(bench, requests, quick=options.quick)
    yield _prompts(bench, "first-token", requests=1, tokens=PROMPT, adapters=1, **ALONE)
    yield _prompts(bench, "prefill", requests=16, tokens=256, adapters=16, **STEPS)


def _decodes(bench: Bench, requests: int, *, quick: bool) -> Iterator[Program]:
    batch = Batch(requests=requests, tokens=1, kv_tokens=CONTEXT, adapters=0)
    for impl in ("triton", "xla") if requests in (8, 32) and not quick else ("triton",):
        name = f"decode/b{requests}"
        yield bench.program(name, batch, impl=impl, lora=False, **STEPS)
        for adapters in sorted(n for n in {0, 1, requests} if n <= ADAPTERS):
            own = _with_adapters(batch, adapters)
            yield bench.program(name, own, impl=impl, lora=True, **STEPS)


def _prompts(
    bench: Bench, name: str, *, requests: int, tokens: int, adapters: int, **timing: Any
) -> Iterator[Program]:
    for used in (0, adapters):
        batch = Batch(requests=requests, tokens=tokens, kv_tokens=tokens, adapters=used)
        yield bench.program(name, batch, impl="triton", lora=used > 0, **timing)


def main(arguments: list[str]) -> None:
    options = Options.parse(__doc__, arguments)
    require_gpu("decode_step")
    recorder = Recorder("decode_step")
    bench = Bench(spec_of(LLAVA_1_5_7B), MODELS[MODEL])
    for group in groups(bench, options):
        run_group((program for program in group if options.wants(program.name)), recorder)


if __name__ == "__main__":
    main(sys.argv[1:])
