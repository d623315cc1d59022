"""Compiles in processes of their own.

Tracing and lowering hold Python's lock, and take about as long as what comes after them: with
threads alone most cores would be idle, and whoever takes times beside them would wait for the lock.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from typing import Any

import jax
from jax.experimental import serialize_executable

# Cores for who takes the times, and for what the compilers' own threads do.
SPARE_CORES = 3
# Each has a context of half a GB on the device, next to what jax takes of its memory.
MOST_PROCESSES = 12


class CompileError(Exception):
    """A function does not compile; the message is the first line of the reason."""


class Compilers:
    """Processes that compile; a context manager that ends them.

    Attributes:
      processes: how many, at most.
    """

    def __init__(self, executor: Executor | None = None):
        """Takes an executor where functions are compiled in another way, as in tests."""
        cores = len(os.sched_getaffinity(0))
        self.processes = min(max(1, cores - SPARE_CORES), MOST_PROCESSES)
        self._executor = executor or _new_pool(self.processes)

    def __enter__(self) -> "Compilers":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def submit(self, fn: Callable, shapes: Sequence[Any]) -> Callable[[], bytes | str]:
        """Begins to compile for the first device.

        Args:
          fn: of arrays; a function of a module, or a partial one.
          shapes: pytrees of `jax.ShapeDtypeStruct`, one an argument.

        Returns:
          What waits for the program; `load` takes it.
        """
        work = (_compiled, fn, tuple(shapes))
        try:
            future = self._executor.submit(*work)
        except BrokenExecutor:
            self._executor = _new_pool(self.processes)
            future = self._executor.submit(*work)

        def program() -> bytes | str:
            try:
                return future.result()
            except BrokenExecutor:  # by any function; one at a time, it shows by which
                return _compiled_alone(*work)

        return program


def _new_pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        processes,
        # A fork would share a runtime that has threads and a device.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
    )


def _compiled_alone(*work) -> bytes | str:
    with _new_pool(1) as process:
        try:
            return process.submit(*work).result()
        except BrokenExecutor:
            return "its compiler crashes"


def load(program: bytes | str, arguments: Sequence[Any], result: Any) -> Callable:
    """The compiled function on the first device, whose arguments and result have these trees.

    Raises:
      CompileError: it did not compile.
    """
    if isinstance(program, str):
        raise CompileError(program)
    trees = jax.tree.structure((tuple(arguments), {})), jax.tree.structure(result)
    devices = jax.devices()[:1]
    return serialize_executable.deserialize_and_load(program, *trees, execution_devices=devices)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _begin() -> None:
    # Ctrl-C reaches all processes of a terminal: these end at once, without a traceback each.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A context on the device is all that a compiler needs of its memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    # What comes out of a cache of compilations does not always go on to another process.
    jax.config.update("jax_enable_compilation_cache", False)


def _end_with_parent() -> None:
    """Or a compiler would wait for work for ever, with its context on the device."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _compiled(fn: Callable, shapes: tuple) -> bytes | str:
    """The program, or why there is none: not every error travels between processes."""
    try:
        compiled = jax.jit(fn).lower(*shapes).compile()
    except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
        return first_line(error)
    return serialize_executable.serialize(compiled)[0]
