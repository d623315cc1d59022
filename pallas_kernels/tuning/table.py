"""Tables of tiles that were measured on a device: `pallas_kernels/tuned/<device>.json`.

An entry, one line, says which tile was the fastest for a key at one height of row tiles, and how
long a call took. Tiles that failed on the device are in it too, so that a search leaves them out.
Which entry serves a shape that was not measured is the rule of `Table.nearest`.
"""

import dataclasses
import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pallas_kernels.tuning import records

FORMAT = 1
FOLDER = Path(__file__).parents[1] / "tuned"
# A tile says nothing about a shape of which a width is larger or smaller by more than this.
FARTHEST_WIDTH = 4.0
# Nor about a step whose rows are so many times more or fewer: the kernels' best height changes.
FARTHEST_TOKENS = 4.0

# How many adapters a step brings: about 1, 8 or 32; "any" where that is not known in advance.
Segments = Literal["any", "few", "some", "many"]
SEGMENTS: tuple[Segments, ...] = get_args(Segments)


class TableError(ValueError):
    """A table that cannot be used: damaged, of another format, or of another device."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Key:
    """What a tile is for.

    Attributes:
      op: operator, such as "lora".
      width: K, of the input.
      columns: N, of all linears that share it.
      tokens: rows of the step.
      segments: how many adapters they bring.
    """

    op: str
    width: int
    columns: int
    tokens: int
    segments: Segments

    def __post_init__(self):
        if min(self.width, self.columns, self.tokens) < 1:
            raise ValueError(f"{self} has sizes below 1")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entry[Tile]:
    """The fastest tile of its height at a key; `us` is a call's time in microseconds."""

    key: Key
    tile: Tile
    us: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Skipped[Tile]:
    """A tile that failed at a key, and why."""

    key: Key
    tile: Tile
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TileKind[Tile]:
    """How tiles of one operator are read and judged.

    Attributes:
      type: dataclass of whole numbers and of such dataclasses.
      height: of the row tiles that a tile is for; a key has an entry for each.
      refusals: rules that a tile breaks.
    """

    type: type[Tile]
    height: Callable[[Tile], int]
    refusals: Callable[[Tile], list[str]]


class Table:
    """The entries of one device.

    Attributes:
      device: `jax.Device.device_kind`.
      jax: version that measured last.
      entries: by key and height.
      skipped: in the order in which they were met.
    """

    def __init__(self, *, device: str, jax: str, kinds: Mapping[str, TileKind]):
        self.device, self.jax = device, jax
        self.entries: dict[tuple[Key, int], Entry] = {}
        self.skipped: list[Skipped] = []
        self._kinds = kinds

    def add(self, entry: Entry) -> None:
        """Takes an entry, in place of the one of its key and height."""
        self.entries[entry.key, self._kinds[entry.key.op].height(entry.tile)] = entry

    def nearest(self, key: Key, *, height: int) -> Entry | None:
        """Returns the entry of a key, or of the nearest one of that operator and height.

        Nearest in the logarithm of the tokens, then in those of the widths, then in the class of
        segments; of two as near, the larger. None if no shape within `FARTHEST_WIDTH` and nearer
        than `FARTHEST_TOKENS` is known.
        """
        if (entry := self.entries.get((key, height))) is not None:
            return entry
        near = [
            entry
            for (other, at), entry in self.entries.items()
            if (other.op, at) == (key.op, height)
            and max(_width_octaves(other, key)) <= math.log2(FARTHEST_WIDTH)
            and _is_near(other.tokens, key.tokens)
        ]
        return min(near, key=lambda entry: _distance(entry.key, key), default=None)

    def height(self, op: str, *, tokens: int, segments: Segments) -> int | None:
        """Returns the height of row tiles for a step, whatever linears it has; None if unknown.

        At the nearest number of tokens and class of segments, it is the one of the shortest times
        in geometric mean, over those shapes that were measured at every height.
        """
        keys = {key for key, _ in self.entries if key.op == op and _is_near(key.tokens, tokens)}
        if not keys:
            return None
        near = min(keys, key=lambda k: (_octaves(k.tokens, tokens), -k.tokens)).tokens
        keys = {key for key in keys if key.tokens == near}
        nearest = min(keys, key=lambda k: _segments_distance(k.segments, segments)).segments
        times: dict[Key, dict[int, float]] = {}
        for (key, at), entry in self.entries.items():
            if key in keys and key.segments == nearest:
                times.setdefault(key, {})[at] = entry.us
        heights = {at for of_shape in times.values() for at in of_shape}
        complete = [of_shape for of_shape in times.values() if of_shape.keys() == heights]
        return min(heights, key=lambda at: (sum(math.log(us[at]) for us in complete), at))

    def write(self, path: Path) -> None:
        """Writes the file, all or nothing: equal tables are equal bytes."""
        entries = [
            _row(e.key) | {"us": e.us, "tile": dataclasses.asdict(e.tile)}
            for _, e in sorted(self.entries.items(), key=lambda item: item[0])
        ]
        skipped = [
            _row(s.key) | {"reason": s.reason, "tile": dataclasses.asdict(s.tile)}
            for s in sorted(self.skipped, key=lambda s: (s.key, str(s.tile)))
        ]
        lines = [
            "{",
            f'"format": {FORMAT},',
            f'"device": {json.dumps(self.device)},',
            f'"jax": {json.dumps(self.jax)},',
            *_list("entries", entries, end=","),
            *_list("skipped", skipped, end=""),
            "}",
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def read(cls, path: Path, *, device: str, kinds: Mapping[str, TileKind]) -> "Table":
        """Reads a file, and checks all of it.

        Raises:
          TableError: it is damaged, of another format or device, or holds an illegal tile.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls._of(data, device=device, kinds=kinds)
        except (ValueError, OverflowError, RecursionError) as error:
            raise TableError(
                f"{path} is no table of tiles for this device: {error}; delete it to use computed "
                "tiles, or make it anew with `valora tune`"
            ) from error

    @classmethod
    def _of(cls, data: Any, *, device: str, kinds: Mapping[str, TileKind]) -> "Table":
        names = {"format", "device", "jax", "entries", "skipped"}
        if not isinstance(data, dict) or data.keys() != names:
            raise ValueError(f"want the fields {', '.join(sorted(names))}")
        if type(data["format"]) is not int or data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, this version reads {FORMAT}")
        if data["device"] != device:
            raise ValueError(f"it is of {data['device']!r}, the device here is {device!r}")
        for name, kind in {"jax": str, "entries": list, "skipped": list}.items():
            if not isinstance(data[name], kind):
                raise ValueError(f"{name}={reprlib.repr(data[name])}, want a {kind.__name__}")
        table = cls(device=device, jax=data["jax"], kinds=kinds)
        for row in data["entries"]:
            key, tile, us = _parse(row, kinds, "us")
            if type(us) not in (int, float) or not 0 < us < math.inf:
                raise ValueError(f"us={us!r} of {key} is no time")
            table.add(Entry(key=key, tile=tile, us=float(us)))
        if len(table.entries) < len(data["entries"]):
            raise ValueError("two entries have the same key and height")
        for row in data["skipped"]:
            key, tile, reason = _parse(row, kinds, "reason")
            table.skipped.append(Skipped(key=key, tile=tile, reason=str(reason)))
        return table


def path_of(device: str) -> Path:
    """The file of a device kind."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def _parse(row: Any, kinds: Mapping[str, TileKind], extra: str) -> tuple[Key, Any, Any]:
    """The key and the tile of a row, and what it says about them."""
    if not isinstance(row, dict) or not {"tile", extra} <= row.keys():
        raise ValueError(f"{row!r} has no tile or no {extra}")
    key = records.read(Key, {n: value for n, value in row.items() if n not in ("tile", extra)})
    if (kind := kinds.get(key.op)) is None:
        raise ValueError(f"op={key.op!r} is unknown; known: {', '.join(sorted(kinds))}")
    tile = records.read(kind.type, row["tile"])
    if faults := kind.refusals(tile):
        raise ValueError(f"the tile of {key} is not legal: {'; '.join(faults)}")
    return key, tile, row[extra]


def _row(key: Key) -> dict[str, Any]:
    return dataclasses.asdict(key)


def _list(name: str, rows: Iterable[Mapping[str, Any]], *, end: str) -> list[str]:
    texts = [json.dumps(row) for row in rows]
    return [f'"{name}": [', *([",\n".join(texts)] if texts else []), f"]{end}"]


def _is_near(known: int, tokens: int) -> bool:
    return _octaves(known, tokens) < math.log2(FARTHEST_TOKENS)


def _octaves(a: float, b: float) -> float:
    return abs(math.log2(a / b))


def _width_octaves(a: Key, b: Key) -> tuple[float, float]:
    return _octaves(a.width, b.width), _octaves(a.columns, b.columns)


def _segments_distance(a: Segments, b: Segments) -> tuple[int, int]:
    """ "any" suits every class better than another class does."""
    places = SEGMENTS.index(a), SEGMENTS.index(b)
    return (0 if a == b else 1 if "any" in (a, b) else 2, abs(places[0] - places[1]))


def _distance(known: Key, key: Key) -> tuple:
    """From a measured key to the wanted one; the last places decide between equals."""
    return (
        _octaves(known.tokens, key.tokens),
        -known.tokens,
        sum(_width_octaves(known, key)),
        _segments_distance(known.segments, key.segments),
        (-known.width, -known.columns),
    )
