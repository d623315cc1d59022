"""`valora bench`: request traces through an engine or its cost model, and plots of the results."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Union

import tyro

from valora_jax.replay.settings import ReplaySettings


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """Draw the records of `valora bench replay --output`: latency against rate, and timelines."""

    records: tyro.conf.Positional[Path]
    """The file of records."""
    folder: tyro.conf.Positional[Path]
    """Where the plots go."""


BenchCommand = Union[  # noqa: UP007 (type checkers know no | between Annotated)
    Annotated[tyro.conf.FlagCreatePairsOff[ReplaySettings], tyro.conf.subcommand("replay")],
    Annotated[Plot, tyro.conf.subcommand("plot")],
]


def run(command: BenchCommand) -> int:
    """Does what `command` says; returns the exit code."""
    # Late: these bring rich, and where a model is served jax.
    if isinstance(command, Plot):
        from valora_jax.replay import plots, records

        for path in plots.draw(records.read(command.records), command.folder):
            print(path)
        return 0
    from valora_jax.replay.run import run as run_replay

    run_replay(command, command=shlex.join(["valora", *sys.argv[1:]]))
    return 0
