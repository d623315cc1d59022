"""A replay over time, in few numbers: modes of the device, requests running and waiting."""

import dataclasses
from collections.abc import Sequence

from valora_jax.lora.mode import Mode
from valora_jax.replay.outcome import Outcome


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Means over bins of equal length, from the start of a trace to its last end.

    Attributes:
      bin_s: length of a bin.
      modes: mode -> share of each bin in which steps of it ran; the rest was between steps.
      running: requests that steps had begun to serve and that had not ended.
      waiting: requests that had come and that no step had served.
    """

    bin_s: float
    modes: dict[str, list[float]]
    running: list[float]
    waiting: list[float]


def timeline(outcome: Outcome, *, bins: int = 100) -> Timeline:
    """Of a replay in which something ended or ran."""
    ends = [s.finished_s for s in outcome.served if s.finished_s is not None]
    ends += [step.start_s + step.ms / 1e3 for step in outcome.steps]
    bin_s = max(ends) / bins
    modes = {mode.value: [0.0] * bins for mode in Mode}
    for step in outcome.steps:
        _cover(modes[step.mode.value], step.start_s, step.start_s + step.ms / 1e3, bin_s)
    running, waiting = [0.0] * bins, [0.0] * bins
    for served in outcome.served:
        admitted_s = max(ends) if served.admitted_s is None else served.admitted_s
        finished_s = max(ends) if served.finished_s is None else served.finished_s
        _cover(waiting, served.arrival.at_s, admitted_s, bin_s)
        _cover(running, admitted_s, finished_s, bin_s)
    return Timeline(
        bin_s=bin_s,
        modes={mode: _rounded(shares) for mode, shares in modes.items()},
        running=_rounded(running),
        waiting=_rounded(waiting),
    )


def _cover(shares: list[float], start_s: float, end_s: float, bin_s: float) -> None:
    """Adds the share of each bin that `[start_s, end_s)` covers."""
    first, last = int(start_s / bin_s), min(int(end_s / bin_s), len(shares) - 1)
    for i in range(first, last + 1):
        covered_s = min(end_s, (i + 1) * bin_s) - max(start_s, i * bin_s)
        shares[i] += max(covered_s, 0.0) / bin_s


def _rounded(shares: Sequence[float]) -> list[float]:
    """Three digits are more than a plot shows, and keep a line of JSON short."""
    return [round(share, 3) for share in shares]
