"""`valora tune`: measures the tiles of the LoRA kernels on this machine's GPU."""

import dataclasses
import sys
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tune:
    """Search the fastest tiles of the LoRA kernels on this GPU; goes on where it was stopped."""

    models: tuple[str, ...] = ()
    """Models whose shapes are measured, such as llava-1.5-7b; all where none are given."""
    output: Path | None = None
    """The table to fill; None is the installed package's own, which the kernels read."""
    only: str = ""
    """A regular expression in the names of searches, such as lora/4096-12288/t512/h64."""
    minutes: float = 25.0
    """No search begins after so many."""


def run(command: Tune) -> int:
    """Tunes; returns the exit code, 1 after a line on stderr if a tile brought the GPU down."""
    # Late: these bring jax, seconds that `--help` should not take.
    from pallas_kernels.lora_matmul.measure import DeviceLostError
    from pallas_kernels.tuning.run import tune

    try:
        tune(**dataclasses.asdict(command))
    except DeviceLostError as error:
        print(f"valora tune: {error}", file=sys.stderr)
        return 1
    return 0
