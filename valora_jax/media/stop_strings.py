"""Watches streamed text for stop strings, and holds back only what could still become one.

However the text is cut into pieces, the result is the same: the stop string that is complete first
wins, and of those complete at the same character the longest.
"""

from collections.abc import Sequence


class StopStrings:
    """Cuts one request's text at the first stop string.

    Attributes:
      matched: the stop string that was found, or None so far.
    """

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False):
        """Raises ValueError for an empty stop string, which would stop everything."""
        if isinstance(stops, str) or not all(isinstance(s, str) and s for s in stops):
            raise ValueError(f"stop must be a list of non-empty strings, not {stops!r}")
        self._stops = tuple(stops)
        self._include = include_in_output
        self._held = ""
        self.matched: str | None = None

    def add(self, text: str) -> str:
        """Takes the next text and returns what may be shown; nothing more after a match."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [
            (text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text
        ]
        if found:
            end, _, self.matched = min(found)
            self._held = ""
            return text[: end if self._include else end - len(self.matched)]
        held = self._length_to_hold(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Returns what was held back: the text has ended without completing a stop string."""
        held, self._held = self._held, ""
        return held

    def _length_to_hold(self, text: str) -> int:
        """Length of the longest end of the text that a stop string starts with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._stops)), 0)
