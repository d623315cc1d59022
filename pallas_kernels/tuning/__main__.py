"""`python -m pallas_kernels.tuning`: `valora tune` where there is but jax, NumPy and rich."""

import argparse
import sys
from pathlib import Path

from pallas_kernels.lora_matmul.measure import DeviceLostError
from pallas_kernels.tuning.run import tune


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tuning", description=tune.__doc__
    )
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--minutes", type=float, default=25.0)
    chosen = parser.parse_args(arguments)
    try:
        tune(**vars(chosen))
    except (DeviceLostError, NotImplementedError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(sys.argv[1:])
