"""The engine's functions, each compiled for a shape: all at once at the start, or on first use."""

import contextlib
import gc
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import jax

from valora_jax.engine import step
from valora_jax.engine.kept_functions import KeptFunctions

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
    traces: compilations so far, those that an earlier start made included.
    """

    def __init__(self, kept: KeptFunctions | None = None):
        """Takes the functions that are kept between starts, if any are."""
        self.traces = 0
        self._kept = kept
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
        total, compiling = 2 * len(calls), {}
        with self._keeping(), ThreadPoolExecutor() as pool:
            missing = self._load(pool, calls)
            loaded = total - 2 * len(missing)
            with _without_garbage_collection():
                for done, call in enumerate(missing, loaded):
                    progress(done, total)
                    lowered = self.of(call.function, call.shape).lower(**call.arguments)
                    compiling[pool.submit(self._compile, call, lowered)] = call
            for done, future in enumerate(as_completed(compiling), loaded + len(missing) + 1):
                call = compiling[future]
                self._compiled[call.function, call.shape] = future.result()
                progress(done, total)

    def _load(self, pool: Executor, calls: Sequence[Call]) -> list[Call]:
        """Takes what is kept; returns the calls of which nothing is."""
        if self._kept is None:
            return list(calls)
        missing, paths = [], [self._kept.path_of(*call) for call in calls]
        loaded = pool.map(self._kept.load, paths, [call.arguments for call in calls])
        for call, compiled in zip(calls, loaded, strict=True):
            if compiled is None:
                missing.append(call)
            else:
                self._compiled[call.function, call.shape] = compiled
                self.traces += 1
        return missing

    def _compile(self, call: Call, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        compiled = lowered.compile()
        if self._kept is not None:
            self._kept.save(self._kept.path_of(*call), compiled)
        return compiled

    def _keeping(self) -> contextlib.AbstractContextManager[None]:
        return self._kept.compiling() if self._kept is not None else contextlib.nullcontext()


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
