"""Owns the device: weights, cache, features, adapters; runs compiled steps and hands back handles.

Decides nothing. Calls enqueue work and return; `InFlight.read` waits for its results.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import KVPages
from valora_jax.config import EngineConfig
from valora_jax.engine import step
from valora_jax.engine.batch import SCORE_ROWS
from valora_jax.engine.buckets import Bucket
from valora_jax.engine.fill import Sources, fill, neutral, next_tokens
from valora_jax.engine.kept_functions import KeptFunctions
from valora_jax.engine.memory_plan import MemoryPlan
from valora_jax.engine.plan import Chunk, Folded, Plan
from valora_jax.engine.precision import Precision
from valora_jax.engine.request import Request
from valora_jax.engine.sampler import Sampled, SamplerState, wants_only_likeliest
from valora_jax.engine.shapes import IMAGES_A_CALL, StepShapes
from valora_jax.engine.step_functions import Call, StepFunctions
from valora_jax.engine.weights import StepWeights
from valora_jax.lora.heads import TaskHeads, class_logits
from valora_jax.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InFlight:
    """A step that was enqueued.

    Attributes:
      plan: what it computes.
      requests: of each sampled row.
      sampled: on the device; rows past those of `requests` mean nothing.
      scores: blocks of `SCORE_ROWS` of the plan's tokens in order: logits `[rows, V]`, and the
        token that follows in the prompt as if it had been sampled. None where nobody asked.
      classes: request -> `[rows, C]`, of which the first row is what its task head says.
    """

    plan: Plan
    requests: list[Request]
    sampled: Sampled
    scores: list[tuple[jax.Array, Sampled]] | None
    classes: dict[Request, jax.Array]

    def read_scores(self) -> tuple[np.ndarray, Sampled]:
        """Waits for the scores: NumPy arrays, a row for each of the plan's tokens and padding."""
        logits, following = zip(*self.scores or (), strict=True)
        rows = [block.to_numpy() for block in following]
        return np.concatenate(logits), jax.tree.map(lambda *x: np.concatenate(x), *rows)


class Adapters(Protocol):
    """What steps need of adapters; see `engine.adapters`."""

    def arrays(self) -> step.AdapterArrays:
        """Their place on the device, as it is now."""
        ...

    @property
    def task_heads(self) -> TaskHeads: ...


class Runner:
    """Compiles on first use of a shape; `warm_up` uses them all.

    Attributes:
      shapes: of steps.
    """

    def __init__(
        self,
        weights: StepWeights,
        spec: ModelSpec,
        config: EngineConfig,
        *,
        max_tokens_per_step: int,
        precision: Precision,
        memory: MemoryPlan,
        sources: Sources,
        adapters: Adapters | None,
    ):
        """Takes the memory of `memory`; `adapters` is None in an engine that serves none."""
        self._spec, self._sources, self._adapters = spec, sources, adapters
        self._padding_row = config.max_requests
        self._weights = weights
        self.shapes = StepShapes(
            weights.shape,
            spec,
            config,
            max_tokens_per_step=max_tokens_per_step,
            precision=precision,
            request_pages=memory.request_pages,
            with_adapters=adapters is not None,
        )
        shape = (spec.layers * memory.kv_pages, spec.kv_heads, config.page_tokens, spec.head_width)
        zeros = functools.partial(jnp.zeros, dtype=precision.prompts)
        self._kv = KVPages(k_PKpH=zeros(shape), v_PKpH=zeros(shape))
        self._state = SamplerState.empty(
            max_requests=config.max_requests, vocab_rows=spec.vocab_rows
        )
        # One slot more than the cache hands out: a warm-up writes there.
        self._scratch_row = config.image_slots * spec.tokens_per_image
        self._features_FD = zeros((self._scratch_row + spec.tokens_per_image, spec.width))
        self._functions = StepFunctions(KeptFunctions.on_this_device(config.compile_cache))
        self._set_counts = jax.jit(SamplerState.with_counts, donate_argnums=0)

    @property
    def traces(self) -> int:
        """Compilations so far."""
        return self._functions.traces

    def execute(self, plan: Plan, folded: Folded | None) -> InFlight:
        """Enqueues a plan's step, and the scores of prompts that want them.

        `folded` is the adapter in the merged weights, on which it runs then.
        """
        plan = self._sorted_by_adapter(plan)
        chunks = plan.chunks
        prompt_tokens = plan.tokens - len(plan.decodes)
        bucket = self.shapes.choose(decodes=len(plan.decodes), prompt_tokens=prompt_tokens)
        slots = {self._sources.adapter_slot(chunk.request) for chunk in chunks}
        packed, fields = self.shapes.layout(bucket).buffer()
        neutral(fields, vocab_rows=self._spec.vocab_rows, padding_row=self._padding_row)
        requests = fill(fields, plan, self._sources)
        if folded is not None:
            fields["merged"][...] = folded.slot
            fields["adapter"][plan.tokens :] = folded.slot  # or padding would subtract it
        shape = self.shapes.step(bucket, with_lora=_needs_lora(slots, folded))
        outputs = self._run(shape, packed, merged=folded is not None)
        hidden_TD, sampled = outputs.hidden_TD, outputs.sampled
        if not wants_only_likeliest(fields, vocab_rows=self._spec.vocab_rows):
            sampled = self._resample(bucket, outputs.logits_SV, packed)
        jax.tree.map(lambda x: x.copy_to_host_async(), sampled)
        scores = None
        if any(chunk.request.needs_prompt_logits for chunk in chunks):
            adapter_T, target_T = fields["adapter"], next_tokens(plan, bucket.tokens)
            scores = self._score(hidden_TD, adapter_T, target_T, tokens=plan.tokens)
        return InFlight(
            plan=plan,
            requests=requests,
            sampled=sampled,
            scores=scores,
            classes={
                request: self._classify(hidden_TD, fields["sample_index"][row], request)
                for row, request in enumerate(requests)
                if request.needs_classes
            },
        )

    def encode(self, images: Sequence[tuple[np.ndarray, int, int]]) -> None:
        """Enqueues features of images, each `(pixels_3hw, feature slot, adapter slot or -1)`."""
        while images:
            n = max(size for size in IMAGES_A_CALL if size <= len(images))
            pixels, slots, adapters = zip(*images[:n], strict=True)
            rows = [slot * self._spec.tokens_per_image for slot in slots]
            self._encode(np.stack(pixels), rows, adapters)
            images = images[n:]

    def read_features(self, slot: int) -> np.ndarray:
        """Waits for the features in a slot, `[tokens_per_image, D]`."""
        first = slot * self._spec.tokens_per_image
        return np.asarray(self._features_FD)[first : first + self._spec.tokens_per_image]

    def set_counts(self, request: Request) -> None:
        """Tells the sampler the tokens of a newly admitted request that has penalties."""
        vocab_rows, row = self._spec.vocab_rows, request.row
        assert row is not None  # it was admitted
        in_prompt_V = np.zeros(vocab_rows, bool)
        in_prompt_V[list(request.prompt_token_ids)] = True
        count_V = np.bincount(request.output_token_ids, minlength=vocab_rows).astype(np.int32)
        self._state = self._set_counts(self._state, np.int32(row), count_V, in_prompt_V)

    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """Compiles every shape, then runs each on nothing; `progress(done, all)` on the way."""
        steps, images = list(self.shapes.all_steps()), list(self.shapes.all_images())
        self._functions.compile_together(self._calls(steps, images), progress)
        for bucket, shape in steps:
            packed, fields = shape.layout.buffer()
            neutral(fields, vocab_rows=self._spec.vocab_rows, padding_row=self._padding_row)
            outputs = self._run(shape, packed)
            self._resample(bucket, outputs.logits_SV, packed)
            adapter_T = np.full(bucket.tokens, 0 if shape.with_lora else -1, np.int32)
            self._score(outputs.hidden_TD, adapter_T, np.zeros_like(adapter_T), tokens=1)
            if self._adapters:
                block = self._block(outputs.hidden_TD, np.int32(0))
                _classify(block, self._adapters.task_heads, np.zeros(SCORE_ROWS, np.int32))
        for n, shape in images:
            pixels = np.zeros((n, *self._spec.pixel_shape), np.float32)
            self._encode(pixels, [self._scratch_row] * n, [0 if shape.with_lora else -1] * n)
        row, counts_V = np.int32(self._padding_row), np.zeros(self._spec.vocab_rows, np.int32)
        self._state = self._set_counts(self._state, row, counts_V, counts_V.astype(bool))
        jax.block_until_ready((self._kv, self._features_FD, self._state))

    def _calls(
        self,
        steps: Sequence[tuple[Bucket, step.StepShape]],
        images: Sequence[tuple[int, step.StepShape]],
    ) -> list[Call]:
        """Everything that is compiled; what takes the compiler longest comes first."""
        long = [
            Call(step.decoder_step, shape, self._step_arguments(shape, shape.layout.buffer()[0]))
            for _, shape in steps
        ]
        for n, shape in images:
            pixels = np.zeros((n, *self._spec.pixel_shape), np.float32)
            arguments = self._image_arguments(shape, pixels, shape.layout.buffer()[0])
            long.append(Call(step.encode_images, shape, arguments))
        long.sort(key=lambda call: (call.shape.with_lora, call.shape.layout.rows), reverse=True)
        short = (call for bucket, shape in steps for call in self._calls_after(bucket, shape))
        return [*long, *{(call.function, call.shape): call for call in short}.values()]

    def _calls_after(self, bucket: Bucket, shape: step.StepShape) -> Iterator[Call]:
        """What is computed from a step's results, which other steps may share."""
        D, V = self._spec.width, self._spec.vocab_rows
        layout, logits_SV = self.shapes.rows(bucket.rows), _abstract(bucket.rows, V, np.float32)
        sampling = dict(state=self._state, logits_SV=logits_SV, packed=layout.buffer()[0])
        yield Call(step.resample, layout, sampling)
        hidden_TD = _abstract(bucket.tokens, D, shape.dtype)
        block = dict(hidden_TD=hidden_TD, start=np.int32(0))
        yield Call(step.score_block, (bucket.tokens, shape.dtype), block)
        scores = self.shapes.scores(shape.dtype, with_lora=shape.with_lora)
        block_TD = _abstract(SCORE_ROWS, D, shape.dtype)
        arguments = self._score_arguments(scores, block_TD, scores.layout.buffer()[0])
        yield Call(step.score, scores, arguments)

    def _step_arguments(
        self, shape: step.StepShape, packed: np.ndarray, *, merged: bool = False
    ) -> dict[str, Any]:
        return dict(
            leaves=self._weights.leaves(shape.dtype, merged=merged),
            kv=self._kv,
            state=self._state,
            features_FD=self._features_FD,
            adapters=self._arrays(shape),
            packed=packed,
        )

    def _image_arguments(
        self, shape: step.StepShape, pixels_I3hw: np.ndarray, packed: np.ndarray
    ) -> dict[str, Any]:
        return dict(
            leaves=self._weights.leaves(shape.dtype, merged=False),
            features_FD=self._features_FD,
            adapters=self._arrays(shape),
            pixels_I3hw=pixels_I3hw,
            packed=packed,
        )

    def _score_arguments(
        self, shape: step.StepShape, hidden_TD: jax.Array, packed: np.ndarray
    ) -> dict[str, Any]:
        return dict(
            leaves=self._weights.leaves(shape.dtype, merged=False),
            adapters=self._arrays(shape),
            hidden_TD=hidden_TD,
            packed=packed,
        )

    def _run(
        self, shape: step.StepShape, packed: np.ndarray, *, merged: bool = False
    ) -> step.StepOutputs:
        """Enqueues a step."""
        run = self._functions.of(step.decoder_step, shape)
        arguments = self._step_arguments(shape, packed, merged=merged)
        self._kv, self._state, outputs = run(**arguments)
        return outputs

    def _resample(self, bucket: Bucket, logits_SV: jax.Array, packed: np.ndarray) -> Sampled:
        """Enqueues the sampling of a step's rows, in place of their likeliest tokens."""
        layout = self.shapes.rows(bucket.rows)
        run = self._functions.of(step.resample, layout)
        packed = packed[: layout.size]
        self._state, sampled = run(state=self._state, logits_SV=logits_SV, packed=packed)
        return sampled

    def _score(
        self, hidden_TD: jax.Array, adapter_T: np.ndarray, target_T: np.ndarray, *, tokens: int
    ) -> list[tuple[jax.Array, Sampled]]:
        """Enqueues the scores of a step's first `tokens` rows, block by block."""
        shape = self.shapes.scores(
            np.dtype(hidden_TD.dtype), with_lora=bool((adapter_T >= 0).any())
        )
        run = self._functions.of(step.score, shape)
        blocks = []
        for start in range(0, tokens, SCORE_ROWS):
            rows = slice(start, min(start + SCORE_ROWS, tokens))
            packed, fields = shape.layout.buffer()
            fields["adapter"][:] = -1
            fields["adapter"][: rows.stop - start] = adapter_T[rows]
            fields["target"][: rows.stop - start] = target_T[rows]
            block_TD = self._block(hidden_TD, np.int32(start))
            blocks.append(run(**self._score_arguments(shape, block_TD, packed)))
        return blocks

    def _classify(self, hidden_TD: jax.Array, row: np.int32, request: Request) -> jax.Array:
        """Enqueues the task head of a request on one row of a step."""
        slot = self._sources.adapter_slot(request)
        adapter_S = np.full(SCORE_ROWS, slot, np.int32)
        assert self._adapters is not None  # who has a task head has an adapter
        return _classify(self._block(hidden_TD, row), self._adapters.task_heads, adapter_S)

    def _block(self, hidden_TD: jax.Array, start: np.int32) -> jax.Array:
        """Enqueues taking `SCORE_ROWS` of a step's rows, and zeros past its end."""
        run = self._functions.of(step.score_block, (len(hidden_TD), np.dtype(hidden_TD.dtype)))
        return run(hidden_TD=hidden_TD, start=start)

    def _encode(self, pixels_I3hw: np.ndarray, rows: list[int], adapters: Sequence[int]) -> None:
        shape = self.shapes.images(len(rows), with_lora=any(slot >= 0 for slot in adapters))
        packed, fields = shape.layout.buffer()
        fields["first_row"][:] = rows
        fields["adapter"][:] = np.repeat(adapters, self._spec.vision_tokens_per_image)
        run = self._functions.of(step.encode_images, shape)
        self._features_FD = run(**self._image_arguments(shape, pixels_I3hw, packed))

    def _arrays(self, shape: step.StepShape) -> step.AdapterArrays | None:
        return self._adapters.arrays() if self._adapters and shape.with_lora else None

    def _sorted_by_adapter(self, plan: Plan) -> Plan:
        """The same plan with neighbours that share an adapter, for the fewest row tiles."""

        def slot(chunk: Chunk) -> int:
            return self._sources.adapter_slot(chunk.request)

        decodes, prefills = (sorted(c, key=slot) for c in (plan.decodes, plan.prefills))
        return dataclasses.replace(plan, decodes=decodes, prefills=prefills)


def _needs_lora(slots: Collection[int], folded: Folded | None) -> bool:
    """Whether a step of rows of these slots multiplies any adapter."""
    if folded is None:
        return any(slot >= 0 for slot in slots)
    return folded.changes_head or any(slot != folded.slot for slot in slots)


_classify = jax.jit(class_logits)


def _abstract(rows: int, columns: int, dtype: np.dtype | type) -> Any:
    return jax.ShapeDtypeStruct((rows, columns), dtype)
