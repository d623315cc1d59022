"""The engine's functions, each compiled for a shape: all at once at the start, or on first use."""

import contextlib
import gc
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import jax

from valora_jax.engine import step

# What comes back in place.
_DONATED: Mapping[Callable, tuple[str, ...]] = {
    step.decoder_step: ("kv", "state"),
    step.resample: ("state",),
    step.encode_images: ("features_FD",),
}


class Call(NamedTuple):
    """A function of `engine.step` for one shape.

    Attributes:
      function: takes the shape, then arrays by name.
      shape: what is fixed when it is traced; hashable.
      arguments: the arrays, or `jax.ShapeDtypeStruct`s in their place.
    """

    function: Callable
    shape: Any
    arguments: dict[str, Any]


class StepFunctions:
    """Attributes:
    traces: compilations so far.
    """

    def __init__(self):
        self.traces = 0
        self._compiled: dict[tuple[Callable, Hashable], Any] = {}

    def of(self, function: Callable, shape: Hashable) -> Any:
        """Returns a function for a shape, which compiles on its first call if it is not yet."""
        if (compiled := self._compiled.get((function, shape))) is None:

            def traced(**arrays):
                self.traces += 1
                return function(shape, **arrays)

            compiled = jax.jit(
                traced,
                donate_argnames=_DONATED.get(function, ()),
                compiler_options=step.compiler_options(shape),
            )
            self._compiled[function, shape] = compiled
        return compiled

    def compile_together(self, calls: Sequence[Call], progress: Callable[[int, int], None]) -> None:
        """Compiles in as many threads as there are cores; tracing takes turns.

        Args:
          calls: those that take longest first, so that no thread is left with one at the end.
          progress: gets how much is done, and how much there is.
        """
        compiling = {}
        with ThreadPoolExecutor() as pool:
            with _without_garbage_collection():
                for done, call in enumerate(calls):
                    progress(done, 2 * len(calls))
                    lowered = self.of(call.function, call.shape).lower(**call.arguments)
                    compiling[pool.submit(lowered.compile)] = call
            for done, future in enumerate(as_completed(compiling), len(calls) + 1):
                call = compiling[future]
                self._compiled[call.function, call.shape] = future.result()
                progress(done, 2 * len(calls))


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """What tracing makes stays in jax's caches: a search for garbage in it finds none, and took a
    fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
