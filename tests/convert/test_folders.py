"""An output folder appears whole or not at all, and never over something by mistake."""

import pytest

from valora_jax.convert.folders import new_folder


def test_a_folder_appears_when_the_block_ends(tmp_path):
    with new_folder(tmp_path / "deep" / "new", sources=(), overwrite=False) as built:
        (built / "file").write_text("x")
        assert not (tmp_path / "deep" / "new").exists()
    assert (tmp_path / "deep" / "new" / "file").read_text() == "x"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["new"]


def test_nothing_appears_when_the_block_fails(tmp_path):
    def fail():
        with new_folder(tmp_path / "new", sources=(), overwrite=True) as built:
            (built / "file").write_text("x")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_old_folder_is_replaced_only_when_asked_and_only_at_the_end(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    with new_folder(place, sources=(), overwrite=False):  # empty: nothing is lost
        pass
    (place / "old").write_text("old")
    with pytest.raises(ValueError, match="not empty; name another place, or pass --overwrite"):
        new_folder(place, sources=(), overwrite=False).__enter__()
    with new_folder(place, sources=(), overwrite=True):
        assert (place / "old").exists()
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("place", ["source", "source/inside", "."])
def test_the_source_is_never_the_target(tmp_path, place):
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(ValueError, match="is, holds or lies in the source"):
        new_folder(tmp_path / place, sources=(source,), overwrite=True).__enter__()


def test_a_file_is_no_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        new_folder(tmp_path / "file", sources=(), overwrite=True).__enter__()
