"""Reads a parsed Hugging Face config and collects everything wrong with it.

A getter always returns something usable, so that one pass finds every fault; `raise_faults` ends
the pass. `null` counts as absent, as in transformers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from valora_jax.errors import CheckpointError


class HfFields:
    """Typed access to one object of a `config.json`; sections report to their parent."""

    def __init__(self, values: Mapping[str, Any], *, prefix: str = "config.json: "):
        self._values = values
        self._prefix = prefix
        self._malformed: list[str] = []
        self._unported: list[str] = []

    def section(self, key: str, default: Mapping[str, Any]) -> "HfFields":
        """A nested object; `default` counts only when it is absent as a whole."""
        values = self._get(key, default)
        if not isinstance(values, Mapping):
            self.malformed(f"{key}={values!r}, want an object")
            values = default
        child = HfFields(values, prefix=f"{self._prefix}{key}.")
        child._malformed, child._unported = self._malformed, self._unported
        return child

    def whole(self, key: str, default: int, *, least: int = 1) -> int:
        """An integer of at least `least`."""
        value = self._get(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return value
        self.malformed(f"{key}={value!r}, want an integer >= {least}")
        return default

    def positive(self, key: str, default: float) -> float:
        """A finite number above zero."""
        value = self._get(key, default)
        if isinstance(value, int | float) and value is not True and 0 < value < float("inf"):
            return float(value)
        self.malformed(f"{key}={value!r}, want a positive number")
        return default

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self._get(key, default)
        if isinstance(value, bool):
            return value
        self.malformed(f"{key}={value!r}, want true or false")
        return default

    def one_of[T](self, key: str, ported: Sequence[T], *, default: T) -> T:
        """A value that must be among `ported`; any other is taken to be legal, but not ported."""
        value = self._get(key, default)
        if value in ported:
            return ported[ported.index(value)]
        self.unported(f"{key}={value!r}; ported: {ported}")
        return default

    def malformed(self, problem: str) -> None:
        """Notes a value that is wrong, or contradicts another."""
        self._malformed.append(self._prefix + problem)

    def unported(self, problem: str) -> None:
        """Notes a legal value that this port does not do."""
        self._unported.append(self._prefix + problem)

    def raise_faults(self) -> None:
        """Raises what was noted here and in every section.

        Raises:
          CheckpointError: something is malformed.
          NotImplementedError: all is well formed, something is not ported.
        """
        if self._malformed:
            raise CheckpointError(self._malformed + self._unported)
        if self._unported:
            raise NotImplementedError("\n  ".join(["not ported:", *sorted(self._unported)]))

    def _get(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        return default if value is None else value
