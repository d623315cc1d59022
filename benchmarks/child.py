"""A long-lived process that answers commands: one JSON object a line each way.

The process waits in a read between commands, so it uses no CPU while another one is measured.
"""

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Child:
    """Starts a process; use it in a `with` block, which ends it."""

    def __init__(
        self, command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None
    ):
        self._command, self._log = list(command), log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=Path(__file__).parent.parent,
                env={**os.environ, **(environment or {})},
            )

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        # A command that an ended process did not take is still in the buffer.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer.

        Raises:
          RuntimeError: the process ended instead; the message has the end of its log.
        """
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            end = "\n  ".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(
                f"{' '.join(self._command)} ended with {self._process.wait()} "
                f"at {op!r}; the log {self._log} ends\n  {end}"
            )
        return json.loads(line)
