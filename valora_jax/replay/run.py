"""Runs what `valora bench replay` was told: every trace under every policy."""

import functools
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console

from valora_jax.config import PolicyName
from valora_jax.replay import plots, records, table
from valora_jax.replay.arrivals import Arrival, without_adapters
from valora_jax.replay.outcome import Outcome
from valora_jax.replay.points import adapters_of, kind_trace, points
from valora_jax.replay.records import BOUND, Record
from valora_jax.replay.settings import ReplaySettings
from valora_jax.replay.systems import SimulatedSystem, System

# Of a trace that tells the capacity; as many as make the means of its lengths steady.
_KIND_REQUESTS = 500


def run(settings: ReplaySettings, *, command: str) -> list[Record]:
    """Replays, prints a table to standard output and progress to standard error, writes files.

    Args:
      settings: checked here.
      command: for the records, what a user would run to get them again.

    Raises:
      ValueError: the settings contradict each other, or do not fit the model or its device.
      ModuleNotFoundError: plots are wanted, and matplotlib is not installed.
    """
    settings.check()
    if settings.plots is not None:
        plots.require_matplotlib()
    notes = Console(stderr=True)
    system = _system(settings)
    of_kind = kind_trace(settings, image_tokens=system.image_tokens, requests=_KIND_REQUESTS)
    found = system.capacity(of_kind)  # also where it is given: this warms up
    capacity = settings.capacity or found
    notes.print(
        f"{system.device}: {found:.2f} requests a second without adapters"
        + (f"; loads are of the {capacity:.2f} given" if settings.capacity else ""),
        soft_wrap=True,
    )
    done = []
    for record in _replays(settings, system, capacity=capacity, command=command):
        token_ms = record["token_ms"]["mean"]
        notes.print(
            f"{record['name']:<72} {token_ms:8.2f} ms/token", highlight=False, soft_wrap=True
        )
        if settings.output is not None:
            records.append(settings.output, [record])
        done.append(record)
    table.show(done, Console(file=sys.stdout))
    if settings.plots is not None:
        for path in plots.draw(done, settings.plots):
            notes.print(str(path), highlight=False)
    return done


def _system(settings: ReplaySettings) -> System:
    if settings.simulate:
        return SimulatedSystem(settings)
    # Late: this brings jax, which a simulation does not need.
    from valora_jax.replay.live import live_system

    return live_system(settings, adapters=adapters_of(settings))


def _replays(
    settings: ReplaySettings, system: System, *, capacity: float, command: str
) -> Iterable[Record]:
    bounds: dict[Sequence[Arrival], tuple[Outcome, Outcome | None]] = {}

    def replay(trace: Sequence[Arrival], policy: PolicyName) -> tuple[Outcome, Outcome | None]:
        return system.replay(trace, policy), system.predict(trace, policy)

    for point in points(settings, image_tokens=system.image_tokens, capacity=capacity):
        record = functools.partial(
            records.record_of, point, settings=settings, device=system.device, command=command
        )
        if settings.bound:
            bare = tuple(without_adapters(point.trace))
            if bare not in bounds:  # once for all spreads over adapters
                bounds[bare] = replay(bare, "unmerged")
            outcome, predicted = bounds[bare]
            yield record(BOUND, outcome, predicted=predicted)
        for policy in settings.policies:
            outcome, predicted = replay(point.trace, policy)
            yield record(policy, outcome, predicted=predicted)
