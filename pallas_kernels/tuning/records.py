"""Frozen dataclasses of plain values, read back from JSON with every field checked."""

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints


def read[T](kind: type[T], data: Any) -> T:
    """Makes a `kind`, a dataclass, of what `dataclasses.asdict` made of one.

    Fields may be int, float, str, a Literal, or another such dataclass.

    Raises:
      ValueError: a field is missing, unknown, or holds something else.
    """
    hints = get_type_hints(kind)
    if not isinstance(data, dict):
        raise ValueError(f"{data!r} is no {kind.__name__}")
    names = {field.name for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    if data.keys() != names:
        odd = ", ".join(sorted(map(repr, data.keys() ^ names)))
        raise ValueError(f"fields of a {kind.__name__} are missing or unknown: {odd}")
    return kind(
        **{name: _value(f"{kind.__name__}.{name}", hints[name], data[name]) for name in data}
    )


def _value(name: str, hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return read(hint, value)  # pyright: ignore[reportArgumentType]
    if get_origin(hint) is Literal:
        fits = value in get_args(hint)
    elif hint is float:
        fits = isinstance(value, int | float) and math.isfinite(value)
    else:
        fits = isinstance(value, hint)
    if not fits or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not {hint}")
    return value
