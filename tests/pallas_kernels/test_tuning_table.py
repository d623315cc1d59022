"""Tables of measured tiles: the file, the look-up, and what is refused."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.tuning.table import (
    SEGMENTS,
    Entry,
    Key,
    Skipped,
    Table,
    TableError,
    TileKind,
    path_of,
)

DEVICE = "NVIDIA H100 80GB HBM3"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    block: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    height: int
    cut: Cut


def refusals(tile: Tile) -> list[str]:
    return [f"block={tile.cut.block} is odd"] if tile.cut.block % 2 else []


KINDS = {"lora": TileKind(type=Tile, height=lambda tile: tile.height, refusals=refusals)}


def key(tokens=8, *, width=4096, columns=4096, segments="any") -> Key:
    return Key(op="lora", width=width, columns=columns, tokens=tokens, segments=segments)


def entry(of: Key, *, height=16, block=2, us=1.0) -> Entry:
    return Entry(key=of, tile=Tile(height=height, cut=Cut(block=block)), us=us)


def table_of(*entries: Entry) -> Table:
    table = Table(device=DEVICE, jax="0.11.2", kinds=KINDS)
    for one in entries:
        table.add(one)
    return table


def read(path, *, device=DEVICE) -> Table:
    return Table.read(path, device=device, kinds=KINDS)


KEYS = st.builds(
    key,
    st.integers(1, 10_000),
    width=st.integers(1, 20_000),
    columns=st.integers(1, 40_000),
    segments=st.sampled_from(SEGMENTS),
)
ENTRIES = st.builds(
    entry,
    KEYS,
    height=st.sampled_from([16, 64]),
    block=st.integers(1, 50).map(lambda n: 2 * n),
    us=st.floats(0.01, 1e6),
)


@given(entries=st.lists(ENTRIES, max_size=8), data=st.data())
def test_a_table_comes_back_and_its_bytes_depend_on_nothing_else(tmp_path_factory, entries, data):
    path = tmp_path_factory.mktemp("tables") / "one.json"
    table = table_of(*{(e.key, e.tile.height): e for e in entries}.values())
    table.skipped = [Skipped(key=e.key, tile=e.tile, reason="no room") for e in entries]
    table.write(path)
    first, back = path.read_bytes(), read(path)
    assert (back.entries, back.device, back.jax) == (table.entries, DEVICE, "0.11.2")
    shuffled = table_of(*data.draw(st.permutations(list(table.entries.values()))))
    shuffled.skipped = data.draw(st.permutations(back.skipped))
    shuffled.write(path)
    assert path.read_bytes() == first


def test_an_entry_is_a_line(tmp_path):
    table_of(entry(key(32)), entry(key(8))).write(tmp_path / "t.json")
    lines = (tmp_path / "t.json").read_text().splitlines()
    assert [json.loads(line.rstrip(","))["tokens"] for line in lines if "tokens" in line] == [8, 32]


@given(entries=st.lists(ENTRIES, min_size=1, max_size=6), wanted=KEYS)
def test_the_entry_of_a_key_itself_is_the_nearest(entries, wanted):
    table = table_of(*entries, entry(wanted, us=7.0))
    assert table.nearest(wanted, height=16).us == 7.0


@pytest.mark.parametrize(
    ("near", "far"),
    [
        (key(16), key(4)),  # of two as near, the larger
        (key(8, width=8192), key(16)),  # the tokens count before the shape,
        (key(8, columns=5000), key(8, columns=6000, segments="few")),  # the shape before the class
        (key(8, columns=5000, segments="any"), key(8, columns=5000, segments="many")),
    ],
)
def test_what_is_nearest(near, far):
    wanted = key(8, segments="few")
    for pair in ((near, far), (far, near)):
        assert table_of(*map(entry, pair)).nearest(wanted, height=16).key == near


def test_neighbouring_classes_are_nearer():
    table = table_of(entry(key(segments="some")), entry(key(segments="many")))
    assert table.nearest(key(segments="few"), height=16).key.segments == "some"


def test_tiles_of_other_heights_and_of_far_shapes_serve_nobody():
    table = table_of(entry(key(), height=64), entry(key(width=1000)))
    assert table.nearest(key(), height=16) is None
    assert table.nearest(key(width=4000), height=16).key.width == 1000
    assert table.nearest(key(width=4001), height=16) is None


def test_the_height_is_that_of_the_least_time_over_all_shapes():
    wide = key(512, columns=12288)
    table = table_of(
        entry(key(512), height=32, us=10.0),
        entry(key(512), height=64, us=8.0),
        entry(wide, height=32, us=20.0),
        entry(wide, height=64, us=22.0),
        # Measured at one height only, it cannot be compared.
        entry(key(512, width=9000), height=32, us=1.0),
        entry(key(8), height=16),
    )
    assert table.height("lora", tokens=600, segments="any") == 64
    table.add(entry(wide, height=64, us=40.0))
    assert table.height("lora", tokens=600, segments="some") == 32
    assert table.height("lora", tokens=3, segments="any") == 16
    # 128 rows are four times fewer, and eight rows sixteen: nothing is known.
    assert table.height("lora", tokens=128, segments="any") is None
    assert table.height("merge", tokens=1, segments="any") is None


def damage(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{", "", "Extra data"),
        ('"format": 1', '"format": 2', "its format is 2, this version reads 1"),
        ('"format": 1', '"format": true', "its format is True, this version reads 1"),
        pytest.param("{", "[" * 100_000, "maximum recursion depth", id="deep"),
        ('"jax": "0.11.2"', '"jax": 11', "jax=11, want a str"),
        ('"skipped"', '"leapt"', "want the fields device, entries, format, jax, skipped"),
        ('"us": 1.0', '"us": NaN', "us=nan of"),
        ('"us": 1.0', '"us": -1', "us=-1 of"),
        ('"us": 1.0', '"us": true', "us=True of"),
        pytest.param('"us": 1.0', f'"us": {10**400}', "too large", id="a number without end"),
        ('"tokens": 8', '"tokens": 0', "has sizes below 1"),
        ('"tokens": 8', '"tokens": "8"', "Key.tokens='8' is not"),
        ('"tokens": 8', '"tokens": true', "Key.tokens=True is not"),
        ('"tokens": 8', '"tokens": 32', "two entries have the same key and height"),
        ('"segments": "any"', '"segments": "all"', "Key.segments='all' is not"),
        ('"op": "lora"', '"op": "loop"', "op='loop' is unknown; known: lora"),
        ('"block": 2', '"block": 3', "is not legal: block=3 is odd"),
        ('"block"', '"blocks"', "fields of a Cut are missing or unknown: 'block', 'blocks'"),
        ('"cut": {"block": 2}', '"cut": 2', "2 is no Cut"),
        ('"tile"', '"tilt"', "has no tile or no us"),
    ],
)
def test_a_damaged_table_is_refused_with_its_fault_and_the_way_out(tmp_path, old, new, message):
    path = tmp_path / "t.json"
    table_of(entry(key(8)), entry(key(32))).write(path)
    path.write_text(damage(path.read_text(), old, new))
    with pytest.raises(TableError, match=r"delete it .* or make it anew with `valora tune`") as e:
        read(path)
    assert message in str(e.value)


@pytest.mark.parametrize("name", ["entries", "skipped"])
@pytest.mark.parametrize("value", [None, 5, {}])
def test_rows_that_are_no_list_are_refused_as_other_damages(tmp_path, name, value):
    path = tmp_path / "t.json"
    table_of().write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(TableError, match=rf"t\.json is no .* {name}=.*, want a list; delete it"):
        read(path)


def test_a_table_of_another_device_is_refused(tmp_path):
    table_of().write(tmp_path / "t.json")
    with pytest.raises(TableError, match="it is of 'NVIDIA H100 80GB HBM3', the device here is"):
        read(tmp_path / "t.json", device="NVIDIA A100-SXM4-80GB")


def test_the_file_is_named_by_the_device():
    assert path_of(DEVICE).parts[-3:] == ("pallas_kernels", "tuned", "nvidia-h100-80gb-hbm3.json")
