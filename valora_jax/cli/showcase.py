"""The three parts of `valora demo`, printed as they happen."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from valora_jax.cli.generate import print_stream
from valora_jax.cli.requests import as_prompt
from valora_jax.demo.random_adapter import write_random_adapter
from valora_jax.engine.engine import Engine
from valora_jax.engine.outputs import RequestOutput
from valora_jax.engine.sampling_params import SamplingParams

QUESTION = "What is the capital of France?"
IMAGE_QUESTION = "What does the picture show?"
RANKS = {"random-8": 8, "random-16": 16}


class Showcase:
    """The three parts of the show."""

    def __init__(self, engine: Engine, console: Console, sampling: SamplingParams):
        self._engine, self._console, self._sampling = engine, console, sampling

    def text(self) -> float:
        """Streams the answer to a text question; returns when its first token was there."""
        self._title("1. A question, streamed")
        self._console.print(f"[bold]{QUESTION}[/bold]")
        prompt = as_prompt(self._engine, QUESTION, images=(), raw=False)
        output = print_stream(self._engine.stream(prompt, self._sampling))
        self._console.print()
        assert output.metrics.first_token_s is not None  # it has an answer
        return output.metrics.first_token_s

    def photographs(self, images: Sequence[Path]) -> None:
        self._title("2. Photographs, in one batch")
        self._note(
            "The two halves of this model have never seen each other: what connects them is "
            "untrained. The photographs run through the whole model, but its answers say nothing "
            "about them yet."
        )
        began_s = time.monotonic()
        prompts = [
            as_prompt(self._engine, IMAGE_QUESTION, images=[image], raw=False) for image in images
        ]
        outputs = self._engine.generate(prompts, self._sampling, show_progress=False)
        for image, output in zip(images, outputs, strict=True):
            self._answer(f"{image.name}: {IMAGE_QUESTION}", output.outputs[0].text)
        self._took(outputs, began_s)

    def adapters(self, model: Path) -> None:
        self._title("3. Adapters, in one batch")
        self._note(
            "The same question to the model and to two LoRA adapters of different ranks, in the "
            "same steps. The adapters' weights are random, not trained: they show that each "
            "request brings its own."
        )
        with tempfile.TemporaryDirectory() as work:
            for name, rank in RANKS.items():
                path = write_random_adapter(Path(work) / name, model=model, rank=rank, seed=rank)
                info = self._engine.load_adapter(name, path)
                self._console.print(f"loaded {name}: {escape(info.bound)}")
            names = [None, *RANKS]
            chats = [[{"role": "user", "content": QUESTION}] for _ in names]
            began_s = time.monotonic()
            outputs = self._engine.chat(chats, self._sampling, adapter=names, show_progress=False)
        for name, output in zip(names, outputs, strict=True):
            self._answer(name or "no adapter", output.outputs[0].text)
        self._took(outputs, began_s)

    def _title(self, text: str) -> None:
        self._console.print(f"[bold cyan]{text}[/bold cyan]")

    def _note(self, text: str) -> None:
        self._console.print(f"[yellow]{text}[/yellow]")

    def _answer(self, question: str, text: str) -> None:
        self._console.print(f"[bold]{escape(question)}[/bold]\n{escape(text.strip())}")

    def _took(self, outputs: Sequence[RequestOutput], began_s: float) -> None:
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        seconds = time.monotonic() - began_s
        self._console.print(
            f"[dim]{len(outputs)} answers, {tokens} tokens in {seconds:.1f} s, "
            "compilation included[/dim]\n"
        )
