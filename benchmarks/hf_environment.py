"""Makes the Python environment with transformers, PEFT and torch that a benchmark compares to."""

import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements-hf.txt"
FOLDER = Path(__file__).parent.parent / ".venv-hf"


def ensure_hf_python() -> Path:
    """Returns the interpreter of `.venv-hf`, which is made and filled if the pins are new.

    Raises:
      subprocess.CalledProcessError: pip could not install the pins; it printed why.
    """
    python, installed = FOLDER / "bin" / "python", FOLDER / REQUIREMENTS.name
    if installed.is_file() and installed.read_text() == REQUIREMENTS.read_text():
        return python
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-r", str(REQUIREMENTS)], check=True)
    installed.write_text(REQUIREMENTS.read_text())
    return python
