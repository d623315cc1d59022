"""The engine's door: prompts in, answers out, adapters loaded and taken away by name.

Whoever waits for an answer drives the engine: there is no thread of its own. Calls from several
threads share the steps, one at a time.
"""

import gc
import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from valora_jax.config import EngineConfig
from valora_jax.engine.adapters import EngineAdapters
from valora_jax.engine.events import Event
from valora_jax.engine.generation import CheckedPrompt, Generation, Prompts, one_each
from valora_jax.engine.metrics import EngineMetrics
from valora_jax.engine.outputs import ClassificationOutput, RequestOutput
from valora_jax.engine.progress import generating
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.engine.start import Parts, start
from valora_jax.errors import AdapterNotFoundError, OutOfCapacityError
from valora_jax.lora.combine import Kind
from valora_jax.lora.host_store import AdapterInfo, AdapterRef
from valora_jax.media.chat import Messages
from valora_jax.media.prompts import Prompt


class Engine:
    """Serves one model with many adapters; use it in a `with` block, or call `close`."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        config: EngineConfig | None = None,
        *,
        show_progress: bool = True,
    ):
        """Loads a checkpoint folder, takes the memory and compiles every step.

        Args:
          model: a checkpoint folder, Hugging Face's or one of `valora convert hf-to-orbax`.
          config: sizes; see there.
          show_progress: bars and the memory plan, on stderr.

        Raises:
          CheckpointError: the folder does not fit a known model; lists every fault.
          NotImplementedError: this variant of a known model is not ported.
          ValueError: the configured sizes do not fit the device.
        """
        self.config = config or EngineConfig()
        self._show_progress = show_progress
        self.parts: Parts = start(Path(model), self.config, show_progress=show_progress)
        self._core = self.parts.core
        self._prompts = Prompts(self.parts, seed=self.config.seed)
        self._lock = threading.RLock()
        self._generations: dict[str, Generation] = {}

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every request and reads what is in flight."""
        for request_id in list(self._generations):
            self.abort(request_id)
        with self._lock:
            while self._core.has_work:
                self._core.step()
            if self._core.adapters:
                self._core.adapters.close()
        gc.unfreeze()  # what warming up set aside

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        show_progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Runs prompts to completion, mixing adapters freely, and returns them in order.

        Args:
          prompts: one, or several: a text, or a dict with "prompt" or "prompt_token_ids" and
            "multi_modal_data".
          sampling_params: for all, or one for each prompt; `SamplingParams()` if None.
          adapter: a loaded adapter's name for all, or one for each prompt; None is the base model.
          show_progress: a bar on stderr; None does as the engine was told.

        Returns:
          One output a prompt. An answer's `finish_reason` is "stop" (end token, stop token or stop
          string), "length", or "abort".

        Raises:
          AdapterNotFoundError: a prompt's adapter is not loaded. Like all the following, before
            any prompt runs.
          ValueError: a prompt has the wrong form, or other images than placeholders.
          ImageError: an image cannot be read, or is too large.
          RequestTooLongError: a prompt can never fit the engine.
        """
        prompts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        one_or_each = SamplingParams() if sampling_params is None else sampling_params
        params = one_each("sampling_params", one_or_each, len(prompts))
        adapters = one_each("adapter", adapter, len(prompts))
        self._check_adapters(adapters)
        checked = [
            self._prompts.check(p, params) for p, params in zip(prompts, params, strict=True)
        ]
        shown = self._show_progress if show_progress is None else show_progress
        return [g.output() for g in self._run_all(checked, adapters, shown=shown)]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        show_progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Like `generate`, for one conversation in OpenAI's form or several, through the chat
        template."""
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Messages], [messages] if one else messages)
        prompts = [self.render_chat(conversation) for conversation in conversations]
        return self.generate(prompts, sampling_params, adapter=adapter, show_progress=show_progress)

    def render_chat(self, messages: Messages) -> Prompt:
        """A conversation as a prompt of `generate`.

        Raises:
          ValueError: messages have the wrong form, or the checkpoint has no chat template.
        """
        return self._prompts.of_chat(messages)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Yields the output as it grows, whole each time; raises at once what `generate` raises.

        Closing the iterator, or losing it, aborts the request.

        Raises:
          OutOfCapacityError: the queue is full.
        """
        self._check_adapters([adapter])
        checked = self._prompts.check(prompt, sampling_params or SamplingParams())
        outputs = self._follow(self._start(checked, adapter))
        next(outputs)  # into its `try`: closing a generator that never began would abort nothing
        return cast(Generator[RequestOutput, None, None], outputs)

    def classify(
        self, prompts: Prompt | Sequence[Prompt], *, adapter: str | Sequence[str]
    ) -> list[ClassificationOutput]:
        """Asks each prompt's adapter for its task head's answer: one prompt pass, no text.

        Raises:
          ValueError: an adapter has no task head; also whatever `generate` raises.
        """
        prompts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        names = one_each("adapter", adapter, len(prompts))
        self._check_adapters(names)
        for name in names:
            if not self._with_adapters(lambda a, name=name: name and a.classes(a.resolve(name))):
                raise ValueError(f"adapter {name!r} has no task head; call generate")
        done = self._run_once(prompts, names, classify=True)
        return self._with_adapters(lambda a: [g.classified(a.classes) for g in done])

    def prompt_logits(
        self, prompts: Sequence[Prompt], *, adapter: str | Sequence[str | None] | None = None
    ) -> list[np.ndarray]:
        """Scores prompts: float32 logits `[tokens, V]` after each token, images' tokens included.

        Raises what `generate` raises.
        """
        names = one_each("adapter", adapter, len(prompts))
        done = self._run_once(prompts, names, keep_logits=True)
        return [np.concatenate(g.jobs[0].scores.logits) for g in done if g.jobs[0].scores]

    def abort(self, request_id: str) -> None:
        """Ends a request; its answers have the finish reason "abort". Too late is no mistake."""
        with self._lock:
            if (generation := self._generations.pop(request_id, None)) is not None:
                for job in generation.jobs:
                    self._core.abort(job)

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> AdapterInfo:
        """Loads a PEFT or original LLaVA adapter folder; the reply says what was bound.

        A loaded name gets a new version; requests in the engine finish on the old one, and steps go
        on while the folder is read.

        Raises:
          AdapterError: it does not fit; lists every fault.
          NotImplementedError: it is of a kind that is not served.
          TensorFileError: a file is damaged.
        """
        new = self._adapters.read(name, Path(path))
        return self._with_adapters(lambda adapters: adapters.register(new))

    def unload_adapter(self, name: str) -> None:
        """Takes a name away; requests in the engine finish. Raises AdapterNotFoundError."""
        self._with_adapters(lambda adapters: adapters.unload(name))

    def pin_adapter(self, name: str) -> None:
        """Brings an adapter to the device while steps go on, and keeps it there, as well as
        later versions. If requests in progress take up the room, it comes when they leave it.

        Raises:
          AdapterNotFoundError: there is no such name.
          OutOfCapacityError: some other adapter would never find a place.
          ValueError, OSError: it was to be read again, and its folder changed or went away.
        """
        ref = self._with_adapters(lambda adapters: adapters.pin(name))
        while self._with_adapters(lambda adapters: adapters.coming(ref)):
            self._step()

    def unpin_adapter(self, name: str) -> None:
        """Lets an adapter go when its place is needed. Raises AdapterNotFoundError."""
        self._with_adapters(lambda adapters: adapters.unpin(name))

    def list_adapters(self) -> list[AdapterInfo]:
        """Every version that is loaded, or still in use."""
        return self._with_adapters(lambda adapters: adapters.infos()) if self._core.adapters else []

    def combine_adapters(
        self, name: str, parts: Mapping[str, float], *, kind: Kind = "cat"
    ) -> AdapterInfo:
        """Registers a weighted sum of loaded adapters as an adapter.

        Args:
          parts: loaded name -> weight.
          kind: "cat" is the exact sum of the updates, "linear" is PEFT's mix of the factors.

        Raises:
          AdapterNotFoundError: a part is not loaded.
          ValueError: the parts cannot be combined that way.
        """
        new = self._adapters.combined(name, parts, kind=kind)
        return self._with_adapters(lambda adapters: adapters.register(new))

    def metrics(self) -> EngineMetrics:
        """What the engine has counted so far."""
        with self._lock:
            return EngineMetrics.of(self._core)

    def on_event(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Lets a function hear of steps, merges and adapters while the engine works; see
        `engine.events` for what it may do. Returns a function that ends it."""
        return self.parts.events.listen(listener)

    @property
    def _adapters(self) -> EngineAdapters:
        if self._core.adapters is None:
            raise ValueError("this engine serves no adapters; raise EngineConfig.max_adapters")
        return self._core.adapters

    def _with_adapters[Result](self, do: Callable[[EngineAdapters], Result]) -> Result:
        with self._lock:
            return do(self._adapters)

    def _check_adapters(self, names: Sequence[str | None]) -> None:
        for name in names:
            if name is not None:
                if self._core.adapters is None:
                    raise AdapterNotFoundError(name, [])
                self._core.adapters.resolve(name)  # listing a thousand takes 1.4 ms

    def _run_once(
        self, prompts: Sequence[Prompt], adapters: Sequence[str | None], **wants: bool
    ) -> list[Generation]:
        """Runs prompts for one token each, for the sake of what `Prompts.check` is told."""
        self._check_adapters(adapters)
        params = SamplingParams(temperature=0, max_tokens=1)
        checked = [self._prompts.check(prompt, params, **wants) for prompt in prompts]
        return self._run_all(checked, adapters, shown=False)

    def _start(self, checked: CheckedPrompt, adapter: str | None) -> Generation:
        """Queues a prompt; raises OutOfCapacityError, with nothing held, when the queue is full."""
        with self._lock:
            held = [self._hold(adapter) for _ in range(checked.params.n)]
            generation = self._prompts.make(checked, held)
            try:
                self._core.add(generation.jobs)
            except Exception:
                for ref in held:
                    if ref is not None:
                        self._adapters.let_go(ref)
                raise
            self._generations[generation.id] = generation
            return generation

    def _hold(self, adapter: str | None) -> AdapterRef | None:
        return None if adapter is None else self._adapters.hold(adapter)

    def _run_all(
        self,
        checked: Sequence[CheckedPrompt],
        adapters: Sequence[str | None],
        *,
        shown: bool,
    ) -> list[Generation]:
        """Runs prompts to completion, queueing as many as there is room for."""
        started: list[Generation] = []
        try:
            with generating(len(checked), shown=shown) as show:
                while not (len(started) == len(checked) and all(g.finished for g in started)):
                    try:
                        while len(started) < len(checked):
                            i = len(started)
                            started.append(self._start(checked[i], adapters[i]))
                    except OutOfCapacityError:
                        if not self._core.has_work:
                            raise
                    self._step()
                    show(sum(g.finished for g in started), sum(g.tokens for g in started))
        finally:
            for generation in started:
                self.abort(generation.id)
        return started

    def _follow(self, generation: Generation) -> Iterator[RequestOutput | None]:
        """Yields None, then outputs; others may drive the request, too, even to its end."""
        try:
            yield None
            seen, finished = 0, False
            while not finished:
                if not generation.finished and generation.tokens == seen:
                    self._step()
                finished = generation.finished
                if finished or generation.tokens > seen:
                    seen = generation.tokens
                    yield generation.output()
        finally:
            self.abort(generation.id)

    def _step(self) -> None:
        with self._lock:
            self._core.step()
