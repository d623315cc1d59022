"""What the GPU benchmarks share: options, the refusal off a GPU, programs, and their records.

A program is checked before it is timed, and its record is written at once: an interrupted run keeps
what it has. Programs of a group share inputs; they are compiled together, by several threads. Until
a group is run, none of its programs takes memory of the device.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from benchmarks.floors import Work
from benchmarks.results import append, cores, results_file
from benchmarks.timing import copy_bytes_per_s, time_program


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Attributes:
    only: a pattern to be found in the names of the programs to run.
    quick: run the points of the goals and a few beside them.
    """

    only: re.Pattern[str]
    quick: bool

    @classmethod
    def parse(cls, description: str | None, arguments: Sequence[str] | None = None) -> "Options":
        # argparse, as machines with a GPU often have little but jax.
        parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
        parser.add_argument("--only", default="", metavar="REGEX", help="programs by name")
        parser.add_argument("--quick", action="store_true", help="the goals' points, few others")
        chosen = parser.parse_args(arguments)
        try:
            return cls(only=re.compile(chosen.only), quick=chosen.quick)
        except re.error as error:
            parser.error(f"--only {chosen.only!r} is no regular expression: {error}")

    def wants(self, name: str) -> bool:
        return self.only.search(name) is not None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """One row of the results.

    Attributes:
      name: what `--only` selects by, unique in its group.
      fields: of the record; at least model, batch, adapters, rank and impl.
      work: of one call.
      run: the function to compile; donates its first argument, and returns it first of two. The
        second is for `error`.
      carry: makes the first argument.
      inputs: makes the other arguments.
      calls: operations of one run; may be a share of one.
      error: of what a run on `carry()` and `inputs()` returned, in units of the tolerance: above 1
        it is wrong. None where there is nothing to compare with.
      baseline: name of a program before it in the group; the record has the time beyond it.
      timing: keywords for `time_program`.
      compiler_options: for XLA.
    """

    name: str
    fields: Mapping[str, Any]
    work: Work
    run: Callable[..., tuple[Any, Any]]
    carry: Callable[[], Any]
    inputs: Callable[[], tuple[Any, ...]]
    calls: float
    error: Callable[[tuple[Any, Any]], float] | None
    baseline: str | None = None
    timing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compiler_options: dict[str, Any] | None = None


def require_gpu(bench: str) -> None:
    """Ends the process off a GPU: a CPU's figures would say nothing about the kernels."""
    if (platform := jax.default_backend()) != "gpu":
        raise SystemExit(
            f"benchmarks.{bench} needs an NVIDIA GPU, but jax runs on {platform!r} here; "
            "on a machine that has one, install jax[cuda13] and unset JAX_PLATFORMS"
        )


class Recorder:
    """Appends a record as soon as there is one, and prints a line of it."""

    def __init__(self, bench: str):
        device = jax.devices()[0].device_kind
        self.path: Path = results_file(bench, device)
        self._copy_bytes_per_s = copy_bytes_per_s()
        self._common = {
            "device": device,
            "jax": jax.__version__,
            "command": " ".join(["python", "-m", f"benchmarks.{bench}", *sys.argv[1:]]),
        }
        self._bench = bench
        self.records: list[Mapping[str, Any]] = []  # of this run
        print(f"{device}: copies {self._copy_bytes_per_s / 1e12:.2f} TB/s; records in {self.path}")

    def write(self, program: Program, measured: Mapping[str, Any]) -> None:
        """Adds what is common to all records; `measured` is a `Timing` or a failure, as a dict."""
        work = program.work
        record = {
            "bench": self._bench,
            "name": program.name,
            **program.fields,
            **measured,
            "floor_ms": work.floor_ms,
            "copy_floor_ms": 1e3 * work.bytes / self._copy_bytes_per_s,
            "bytes": work.bytes,
            "flops": work.flops,
            **self._common,
        }
        append(self.path, [record])
        self.records.append(record)
        print(line(record), flush=True)


def line(record: Mapping[str, Any]) -> str:
    """A record in one line of text."""
    if (failure := record.get("failure")) is not None:
        return f"{record['name']:<52} failed: {failure}"
    ms, floor_ms = record["median_ms"], record["floor_ms"]
    added = f", adds {1e3 * record['added_ms']:.1f} us" if "added_ms" in record else ""
    return f"{record['name']:<52} {ms:10.4f} ms {ms / floor_ms:7.2f} x floor{added}"


def run_group(programs: Iterable[Program], recorder: Recorder) -> None:
    """Compiles, checks and times programs that share inputs.

    One that fails to compile or computes something else gets a record that says so, with no time.
    """
    compiling, executables = [], {}
    # Timed only when nothing compiles beside it: compilers try kernels on the device, too.
    with ThreadPoolExecutor(cores()) as pool:
        for program in programs:
            inputs = program.inputs()
            try:
                lowered = _lower(program, inputs)
            except NotImplementedError as refusal:
                recorder.write(program, {"failure": str(refusal)})
                continue
            # Points that differ in run-time data alone share an executable.
            if (key := (lowered.as_text(), lowered.in_tree)) not in executables:
                executables[key] = pool.submit(lowered.compile)
            compiling.append((program, inputs, executables[key]))
    median_ms: dict[str | None, float] = {}
    for program, inputs, compiled in compiling:
        try:
            measured = _measure(program, inputs, compiled.result())
        except jax.errors.JaxRuntimeError as failure:  # most often: a rival that wants more memory
            measured = {"failure": str(failure).split("\n")[0]}
        if "median_ms" in measured:
            median_ms[program.name] = measured["median_ms"]
            if program.baseline in median_ms:
                measured["added_ms"] = measured["median_ms"] - median_ms[program.baseline]
        recorder.write(program, measured)


def _lower(program: Program, inputs: tuple[Any, ...]) -> jax.stages.Lowered:
    # A copy that is only written is an argument that nothing reads.
    jitted = jax.jit(
        program.run,
        donate_argnums=0,
        keep_unused=True,
        compiler_options=program.compiler_options,
    )
    shapes = jax.eval_shape(program.carry)
    return jitted.lower(shapes, *inputs)


def _measure(
    program: Program, inputs: tuple[Any, ...], run: Callable[..., tuple[Any, Any]]
) -> dict[str, Any]:
    error = None
    if program.error:
        error = program.error(run(program.carry(), *inputs))
        if not error <= 1:  # NaN is wrong, too
            return {"failure": f"wrong by {error:.2f} times the tolerance"}

    def step(carry, *inputs):
        return run(carry, *inputs)[0]

    timing = time_program(step, program.carry(), inputs, calls=program.calls, **program.timing)
    return dataclasses.asdict(timing) | {"error": error}
