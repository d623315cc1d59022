"""What the subcommands share: TOML files of settings, types of flags, and what MODEL means.

A file has a table for each dataclass whose fields it sets, and holds only what differs from the
defaults. The string "None" stands for None, as it does in flags.
"""

import argparse
import dataclasses
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

FLAG_TYPES = ConstructorRegistry()
_ITEM_OF: dict[Any, type] = {str | Sequence[str] | None: str, Sequence[int] | None: int}


@FLAG_TYPES.primitive_rule
def _several_values(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Fields that hold several values or none. tyro knows the types, but not () as a value."""
    if (item := _ITEM_OF.get(info.type)) is None:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{item.__name__.upper()} ...]",
        instance_from_str=lambda values: tuple(item(value) for value in values),
        is_instance=lambda value: value is None or isinstance(value, str | Sequence),
        str_from_instance=lambda values: [str(value) for value in values or ()],
    )


def config_argument(arguments: Sequence[str]) -> Path | None:
    """The value of --config: the file is read first, since its values become flags' defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    try:
        return parser.parse_known_args(list(arguments))[0].config
    except argparse.ArgumentError:
        return None  # it has no value; whoever parses all the flags says so


def with_file(path: Path, tables: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `tables` with a file's differences.

    Args:
      path: a TOML file.
      tables: name of a table -> dataclass with the defaults.

    Raises:
      ValueError: the file is no TOML, has an unknown table or key, or a value of the wrong type
        (all are listed), or a value out of range.
      OSError: it cannot be read.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    faults = [
        f"no table [{name}]; known: {', '.join(f'[{known}]' for known in tables)}"
        for name in content
        if name not in tables
    ]
    changes: dict[str, dict[str, Any]] = {}
    for name in content.keys() & tables.keys():
        changes[name] = _changes(name, content[name], type(tables[name]), faults)
    if faults:
        raise ValueError("\n  ".join([f"{path} does not fit:", *faults]))
    try:
        return {
            name: dataclasses.replace(defaults, **changes.get(name, {}))
            for name, defaults in tables.items()
        }
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _changes(table: str, values: Any, settings: type, faults: list[str]) -> dict[str, Any]:
    """One table's values as the fields' types; what is wrong goes to `faults`."""
    if not isinstance(values, dict):
        faults.append(f"{table} = {values!r}; write a table [{table}]")
        return {}
    types_of = get_type_hints(settings)
    known = [field.name for field in dataclasses.fields(settings)]
    changes = {}
    for key, value in values.items():
        if key not in known:
            faults.append(f"[{table}] has no key {key!r}; known: {', '.join(known)}")
        elif value == "None" and _admits(types_of[key], None):
            changes[key] = None
        elif not _admits(types_of[key], value):
            wanted = getattr(types_of[key], "__name__", str(types_of[key]))
            faults.append(f"[{table}] {key} = {value!r}, want {wanted}")
        else:
            is_path = isinstance(value, str) and _admits(types_of[key], Path())
            changes[key] = Path(value) if is_path else value
    return changes


def _admits(hint: Any, value: Any) -> bool:
    """Whether a TOML value (or None, or a Path) is one of a field's type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        return any(_admits(argument, value) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is not None:  # a sequence
        return isinstance(value, list) and all(_admits(arguments[0], item) for item in value)
    if hint is float:
        return type(value) in (int, float)
    if hint is Path:
        return isinstance(value, str | Path)
    return type(value) is hint


def model_folder(model: str, *, show_progress: bool) -> Path:
    """The folder that MODEL means: `demo` is the demo model, made if it is not there yet."""
    if model != "demo":
        return Path(model).expanduser()
    # Late: its builder's packages are slow to import, and only this model needs them.
    from valora_jax.demo import ensure_demo_checkpoint

    return ensure_demo_checkpoint(show_progress=show_progress)
