"""The `valora` command. A subcommand's packages are imported only when it runs.

Exit codes: 0 done, 1 it could not be done (one message on stderr), 2 the command line is wrong,
130 interrupted. `VALORA_TRACEBACK=1` shows where an error was raised instead of its message alone.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Union

import tyro

from valora_jax.cli import bench, convert, demo, generate, tune
from valora_jax.cli.settings import FLAG_TYPES, config_argument
from valora_jax.errors import ValoraError

# What a user can mend. ModuleNotFoundError: an extra is not installed, as the message says.
_USERS_TO_MEND = (ValoraError, ValueError, NotImplementedError, OSError, ModuleNotFoundError)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Convert:
    """Convert models and adapters between formats, merge adapters, inspect folders."""

    command: Annotated[convert.ConvertCommand, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Bench:
    """Replay request traces through an engine or its cost model, draw the results."""

    command: Annotated[bench.BenchCommand, tyro.conf.arg(name="")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `valora` with these arguments, or the process's; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    return _guarded("valora", lambda: _run(arguments))


def convert_main(arguments: Sequence[str] | None = None) -> int:
    """Runs `valora-convert`, which is `valora convert`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)

    def run() -> int:
        return convert.run(tyro.cli(convert.ConvertCommand, prog="valora-convert", args=arguments))

    return _guarded("valora-convert", run)


def _run(arguments: list[str]) -> int:
    match command := _parse(arguments):
        case demo.Demo():
            return demo.run(command)
        case generate.Generate():
            return generate.run(command)
        case _Bench():
            return bench.run(command.command)
        case _Convert():
            return convert.run(command.command)
        case tune.Tune():
            return tune.run(command)
    raise AssertionError(f"tyro made a {type(command).__name__}")


def _parse(arguments: list[str]) -> Any:
    """The subcommand's dataclass; exits with 0 after `--help`, with 2 if the flags are wrong."""
    defaults = generate.defaults(config_argument(arguments))
    commands: Any = Union[  # noqa: UP007 (type checkers know no | between Annotated)
        Annotated[demo.Demo, tyro.conf.subcommand("demo")],
        Annotated[generate.Generate, tyro.conf.subcommand("generate", default=defaults)],
        Annotated[_Convert, tyro.conf.subcommand("convert")],
        Annotated[tune.Tune, tyro.conf.subcommand("tune")],
        Annotated[_Bench, tyro.conf.subcommand("bench")],
    ]
    # A field for the choice: without one, tyro's messages have a name of its own in them.
    root = dataclasses.make_dataclass(
        "Valora", [("command", Annotated[commands, tyro.conf.arg(name="")])]
    )
    return tyro.cli(
        root,
        prog="valora",
        description="Many LoRA adapters on one large multimodal model, served fast, on JAX.",
        args=arguments,
        registry=FLAG_TYPES,
    ).command


def _guarded(prog: str, run: Callable[[], int]) -> int:
    """Turns what a user can mend into one message, and an interrupt into its exit code."""
    try:
        return run()
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone, as `head` does. Python would complain while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _USERS_TO_MEND as error:
        if os.environ.get("VALORA_TRACEBACK", "0") not in ("", "0"):
            raise
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
