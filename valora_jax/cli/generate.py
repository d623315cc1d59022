"""`valora generate`: one prompt streamed to the terminal, or a file of requests in one batch."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import tyro
from rich.console import Console
from rich.progress import Progress

from valora_jax.cli.requests import Defaults, answer_of, answer_requests, as_prompt
from valora_jax.cli.settings import model_folder, with_file
from valora_jax.config import EngineConfig
from valora_jax.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from valora_jax.engine.engine import Engine
    from valora_jax.engine.outputs import RequestOutput


_SAMPLING = SamplingParams(temperature=0.0, max_tokens=256)
# Shapes compile when they are first met: one prompt needs few of them, and no merged weights.
_ENGINE = EngineConfig(warm_up=False, merge="off")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Generate:
    """Answer a prompt, or a file of requests, with a model and any number of adapters."""

    model: tyro.conf.Positional[str]
    """A Hugging Face checkpoint folder, or "demo" for the demo model."""
    prompt: str | None = None
    """The question. With several answers (--n) or --json it is answered whole, else streamed."""
    image: tuple[Path, ...] = ()
    """Image files that belong to the prompt."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """name=FOLDER of a LoRA adapter to load; repeat the flag for several."""
    use: str | None = None
    """The adapter that answers; needed for a prompt where several are loaded. In a file of requests
    it answers those that name none."""
    raw: tyro.conf.FlagCreatePairsOff[bool] = False
    """Take prompts as they are, with an image placeholder for each image, instead of through the
    model's chat template."""
    input: Path | None = None
    """A JSONL file of requests instead of --prompt; docs/cli.md has its keys."""
    output: Path | None = None
    """Where the answers to --input go, in the same order; None is standard output."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the prompt's answer as JSON, with the counts of tokens."""
    progress: bool = True
    """Show progress, the memory plan and the speed, on standard error."""
    config: Path | None = None
    """A TOML file with tables [engine] and [sampling]; flags win over it."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = _SAMPLING
    engine: EngineConfig = _ENGINE


def defaults(config: Path | None) -> Any:
    """What flags that are not given are; a model must be."""
    if config is None:
        return Generate(model=tyro.MISSING)
    own = {"engine": _ENGINE, "sampling": _SAMPLING}
    return Generate(model=tyro.MISSING, config=config, **with_file(config, own))


def run(command: Generate) -> int:
    """Does what `command` says; returns the exit code, 1 if a request of a file has failed."""
    adapters = _check(command)
    # Late: this brings jax, seconds that `--help` and a mistake in the flags should not take.
    from valora_jax.engine.engine import Engine

    shown = command.progress and sys.stderr.isatty()
    folder = model_folder(command.model, show_progress=shown)
    with Engine(folder, command.engine, show_progress=shown) as engine:
        for name, path in adapters.items():
            info = engine.load_adapter(name, path)
            if command.progress:
                print(f"adapter {name}: {info.bound}", file=sys.stderr)
        if command.input is not None:
            return _answer_file(engine, command, shown=shown)
        _answer_prompt(engine, command, adapters)
    return 0


def _check(command: Generate) -> dict[str, Path]:
    """Refuses flags that do not go together; returns the adapters' folders by name."""
    faults = []
    if (command.prompt is None) == (command.input is None):
        faults.append("give either --prompt or --input")
    if command.input is not None and (command.image or command.json):
        faults.append("--image and --json belong to --prompt; the lines of --input have their own")
    if command.input is None and command.output is not None:
        faults.append("--output belongs to --input; redirect the answer to a prompt with > instead")
    adapters: dict[str, Path] = {}
    for text in command.adapter:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            faults.append(f"--adapter {text!r}, want name=FOLDER")
        elif name in adapters:
            faults.append(f"--adapter {name!r} is given twice; use two names")
        adapters[name] = Path(folder).expanduser()
    loaded = ", ".join(adapters) or "none"
    if command.use is not None and command.use not in adapters:
        faults.append(f"--use {command.use!r} is not among the adapters given: {loaded}")
    if command.input is None and command.use is None and len(adapters) > 1:
        faults.append(f"several adapters; say with --use which of them answers: {loaded}")
    if faults:
        raise ValueError("\n  ".join(["the flags do not go together:", *faults]))
    return adapters


def _answer_prompt(engine: "Engine", command: Generate, adapters: dict[str, Path]) -> None:
    adapter = command.use or next(iter(adapters), None)
    prompt = as_prompt(engine, command.prompt, images=command.image, raw=command.raw)
    if command.json or command.sampling.n > 1:
        output = engine.generate(prompt, command.sampling, adapter=adapter, show_progress=False)[0]
        if command.json:
            print(json.dumps(answer_of(output), ensure_ascii=False, indent=2))
        else:
            print("\n".join(f"[{answer.index}] {answer.text}" for answer in output.outputs))
    else:
        output = print_stream(engine.stream(prompt, command.sampling, adapter=adapter))
    if command.progress:
        print(_speed(output), file=sys.stderr)


def print_stream(outputs: Iterator["RequestOutput"]) -> "RequestOutput":
    """Writes an answer to standard output as it grows; returns the whole."""
    last: RequestOutput | None = None
    written = 0
    for last in outputs:
        text = last.outputs[0].text
        print(text[written:], end="", flush=True)
        written = len(text)
    print()
    assert last is not None  # a stream yields at least its end
    return last


def _speed(output: "RequestOutput") -> str:
    """One line about what an answer took. The first token's time includes what compiled for it."""
    tokens = sum(len(answer.token_ids) for answer in output.outputs)
    times = output.metrics
    parts = [f"{len(output.prompt_token_ids)} prompt tokens, {tokens} answer tokens"]
    if times.first_token_s is not None:
        parts.append(f"first after {times.first_token_s - times.arrival_s:.2f} s")
        if times.finished_s is not None and tokens > len(output.outputs):
            seconds = times.finished_s - times.first_token_s
            parts.append(f"then {(tokens - len(output.outputs)) / seconds:.1f} tokens/s")
    return f"[{', '.join(parts)}]"


def _answer_file(engine: "Engine", command: Generate, *, shown: bool) -> int:
    assert command.input is not None
    own = Defaults(
        folder=command.input.parent,
        sampling=command.sampling,
        adapter=command.use,
        raw=command.raw,
    )
    failed = number = 0
    console = Console(stderr=True)
    with (
        command.input.open("rb") as lines,
        _opened(command.output) as out,
        Progress(console=console, disable=not shown, transient=True) as bar,
    ):
        task = bar.add_task("answering", total=None)
        for number, (line, answer) in enumerate(answer_requests(engine, lines, own), 1):
            if "error" in answer:
                failed += 1
                print(f"{command.input}:{line}: {answer['error']}", file=sys.stderr)
            print(json.dumps(answer, ensure_ascii=False), file=out, flush=True)
            bar.update(task, completed=number, description=f"answered {number}")
    if command.progress:
        print(f"[{number - failed} of {number} requests answered]", file=sys.stderr)
    return 1 if failed else 0


@contextlib.contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    with path.open("w", encoding="utf-8") as file:
        yield file
