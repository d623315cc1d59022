"""What a trace can be replayed through: a cost model here, an engine in `live`."""

from collections.abc import Sequence
from typing import Protocol

from valora_jax.config import PolicyName
from valora_jax.engine.policies import make_policy
from valora_jax.engine.rounds import Adapter, AdapterTraits
from valora_jax.replay.arrivals import IMAGE_TOKENS, Arrival
from valora_jax.replay.outcome import Outcome
from valora_jax.replay.settings import ReplaySettings
from valora_jax.replay.simulation import Device, Simulation, capacity, step_limits

_RANKS_A_PAGE = 16
# The cost model counts pages of a linear's average, weighed by widths: of one of the seven linears
# of LLaVA-1.5-7B's layers, q, k, v and o have 2 * 4096 each, and the others 4096 + 11008.
_SHARE_OF_PAGES = {"all": 1.0, "attention": 4 * 8192 / (4 * 8192 + 3 * 15104)}


class System(Protocol):
    """Replays traces, one after the other.

    Attributes:
      device: what the figures are of.
      image_tokens: what an image takes of a prompt.
    """

    device: str
    image_tokens: int

    def capacity(self, trace: Sequence[Arrival]) -> float:
        """Requests a second, of the kind in a trace, that it serves without adapters."""
        ...

    def replay(self, trace: Sequence[Arrival], policy: PolicyName) -> Outcome:
        """Replays a trace to its end."""
        ...

    def predict(self, trace: Sequence[Arrival], policy: PolicyName) -> Outcome | None:
        """The simulation of a replay, from what was learnt; None where the replay is one itself."""
        ...


class SimulatedSystem:
    """LLaVA-1.5-7B on an H100, in simulated time; the same figures for the same settings."""

    device = "simulated H100"
    image_tokens = IMAGE_TOKENS

    def __init__(self, settings: ReplaySettings):
        """Takes the sizes of steps, and what adapters cost, from the settings."""
        self._settings, self._device = settings, Device()
        self._limits = step_limits(
            max_requests=settings.engine.max_requests,
            max_tokens_per_step=settings.engine.max_tokens_per_step,
            tokens_per_image=self.image_tokens,
        )

    def capacity(self, trace: Sequence[Arrival]) -> float:
        return capacity(trace, device=self._device, limits=self._limits, traits=None)

    def replay(self, trace: Sequence[Arrival], policy: PolicyName) -> Outcome:
        max_wait_s = self._settings.engine.max_wait_s
        run = Simulation(
            trace,
            make_policy(policy, max_wait_s=max_wait_s),
            device=self._device,
            limits=self._limits,
            traits=self._traits,
        )
        return run.run().outcome()

    def predict(self, trace: Sequence[Arrival], policy: PolicyName) -> None:
        return None

    def _traits(self, adapter: Adapter) -> AdapterTraits:
        assert isinstance(adapter, int)  # traces number them
        ranks = self._settings.ranks
        pages = -(-ranks[adapter % len(ranks)] // _RANKS_A_PAGE)
        return AdapterTraits(
            pages=pages * _SHARE_OF_PAGES[self._settings.targets],
            mergeable=self._settings.engine.merge == "copy",
        )
