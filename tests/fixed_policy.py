"""A policy that decides the same for every step, and what folds an adapter in for it."""

import contextlib
import dataclasses
from collections.abc import Iterator

from valora_jax.engine.engine import Engine
from valora_jax.engine.policies import make_policy
from valora_jax.engine.rounds import Adapter, Decision, Round
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.lora.host_store import AdapterRef


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Decides one thing."""

    decision: Decision

    def decide(self, round: Round) -> Decision:
        return self.decision

    def forget(self, adapter: Adapter) -> None:
        pass


def fold(engine: Engine, name: str) -> AdapterRef:
    """Makes the engine's copy one of this adapter, whole."""
    # One that a request has brought is on the device.
    (output,) = engine.generate(
        {"prompt_token_ids": [5]}, SamplingParams(max_tokens=1), adapter=name, show_progress=False
    )
    assert output.adapter is not None
    engine.parts.core.modes.merge(output.adapter)
    return output.adapter


@contextlib.contextmanager
def decided(engine: Engine, decision: Decision) -> Iterator[None]:
    """All steps meanwhile run like this."""
    orchestrator = engine.parts.core.modes.orchestrator
    orchestrator.set_policy(Fixed(decision))
    try:
        yield
    finally:
        orchestrator.set_policy(make_policy("unmerged", max_wait_s=1))
