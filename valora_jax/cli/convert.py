"""`valora convert`: conversions between folders, merging, and what a folder holds.

Each command is a dataclass whose fields are its flags; `run` does what one says.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from valora_jax.errors import ValoraError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Conversion:
    source: tyro.conf.Positional[Path]
    """The folder to read."""
    target: tyro.conf.Positional[Path]
    """The folder to write; it appears when it is complete."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace what the target holds."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HfToOrbax(_Conversion):
    """Write a Hugging Face model folder as an Orbax folder."""

    progress: bool = True
    """Show a progress bar."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OrbaxToHf(_Conversion):
    """Write an Orbax folder of a model as the Hugging Face folder it was made of."""

    max_shard_gb: float = 5.0
    """Size of one safetensors file at most, in 10^9 bytes; one tensor may be larger."""
    progress: bool = True
    """Show a progress bar."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PeftToOrbax(_Conversion):
    """Write a PEFT adapter folder as an Orbax folder."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OrbaxToPeft(_Conversion):
    """Write an Orbax folder of an adapter as a PEFT folder, with safetensors."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """Fold an adapter, or a weighted sum of several, into a checkpoint."""

    target: tyro.conf.Positional[Path]
    """The folder to write; it appears when it is complete."""
    model: Path
    """The Hugging Face folder of the base model."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]]
    """An adapter folder, or name=folder; repeat the flag for a sum of adapters."""
    weight: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    """Weight of the adapter at the same place; give none (all are 1) or one for each."""
    kind: Literal["cat", "linear"] = "cat"
    """How several are combined: the exact sum of updates, or PEFT's mix of the factors."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """What the weights are written in; None keeps each as the base stores it."""
    max_shard_gb: float = 5.0
    """Size of one safetensors file at most, in 10^9 bytes; one tensor may be larger."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace what the target holds."""
    progress: bool = True
    """Show a progress bar."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Inspect:
    """Print what a model or adapter folder holds."""

    folder: tyro.conf.Positional[Path]
    """The folder to look into."""
    model: Path | None = None
    """Bind an adapter to this model folder, to see where it attaches and whether it is served."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print JSON instead of a table."""


ConvertCommand = (
    Annotated[HfToOrbax, tyro.conf.subcommand("hf-to-orbax")]
    | Annotated[OrbaxToHf, tyro.conf.subcommand("orbax-to-hf")]
    | Annotated[PeftToOrbax, tyro.conf.subcommand("peft-to-orbax")]
    | Annotated[OrbaxToPeft, tyro.conf.subcommand("orbax-to-peft")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)


def run(command: ConvertCommand) -> int:
    """Does what `command` says; returns the exit code, 1 after a line on stderr if it cannot."""
    try:
        _run(command)
    except (ValoraError, ValueError, NotImplementedError, OSError) as error:
        print(f"valora convert: {error}", file=sys.stderr)
        return 1
    return 0


def _run(command: ConvertCommand) -> None:
    # Late: this brings jax and Orbax, seconds that `--help` should not take.
    from valora_jax import convert

    match command:
        case HfToOrbax(source=source, target=target, overwrite=overwrite, progress=progress):
            convert.hf_to_orbax(source, target, overwrite=overwrite, progress=progress)
        case OrbaxToHf():
            convert.orbax_to_hf(
                command.source,
                command.target,
                max_shard_bytes=round(command.max_shard_gb * 1e9),
                overwrite=command.overwrite,
                progress=command.progress,
            )
        case PeftToOrbax(source=source, target=target, overwrite=overwrite):
            convert.peft_to_orbax(source, target, overwrite=overwrite)
        case OrbaxToPeft(source=source, target=target, overwrite=overwrite):
            convert.orbax_to_peft(source, target, overwrite=overwrite)
        case Merge():
            convert.merge_adapter(
                command.model,
                convert.read_combination(command.model, _parts(command), kind=command.kind),
                command.target,
                dtype=command.dtype,
                max_shard_bytes=round(command.max_shard_gb * 1e9),
                overwrite=command.overwrite,
                progress=command.progress,
            )
        case Inspect():
            report = convert.inspect_folder(command.folder, model=command.model)
            _print(dataclasses.asdict(report), as_json=command.json)


def _parts(command: Merge) -> list[tuple[str, Path, float]]:
    """Name, folder and weight of each adapter to merge."""
    adapters, weights = command.adapter, command.weight or (1.0,) * len(command.adapter)
    if not adapters:
        raise ValueError("no adapter to merge; give --adapter FOLDER or --adapter name=FOLDER")
    if len(adapters) != len(weights):
        raise ValueError(
            f"{len(adapters)} adapters and {len(weights)} weights; give one --weight for each "
            "--adapter, or none"
        )
    parts = []
    for text, weight in zip(adapters, weights, strict=True):
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        parts.append((name if equals else path.name, path, weight))
    return parts


def _print(report: dict[str, Any], *, as_json: bool) -> None:
    console = Console()
    if as_json:
        console.print_json(data=report)
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for field, value in report.items():
        rows = value.items() if field == "weights" else [(field, value)]
        for label, item in rows:
            if item is not None and item != () and item != {}:
                table.add_row(label.replace("_", " ").removesuffix(" bytes"), _shown(label, item))
    console.print(table, markup=False)


def _shown(label: str, value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case int() if label.endswith("_bytes"):
            return f"{value / 1e9:,.3f} GB" if value >= 1e9 else f"{value / 1e6:,.3f} MB"
        case int():
            return f"{value:,}"
        case dict():
            return "\n".join(f"{name}: {_shown('', item)}" for name, item in value.items())
        case tuple() | list():
            return ", ".join(_shown("", item) for item in value)
    return str(value)
