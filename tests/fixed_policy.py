"""Policies that decide by no time: always the same, or something else at every step."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

from valora_jax.engine.engine import Engine
from valora_jax.engine.policies import make_policy
from valora_jax.engine.rounds import Adapter, Decision, Policy, Round
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


@dataclasses.dataclass
class Restless:
    """Wants another mode at every step, and another copy every few; never the same for long."""

    steps: int = 0

    def decide(self, round: Round) -> Decision:
        self.steps += 1
        requests = [*round.running, *round.waiting]
        merge = requests[self.steps // 5 % len(requests)].adapter
        usable = round.copy.usable
        match self.steps % 3:
            case 0 if usable is not None:
                return Decision(folded=usable, merge=merge)
            case 1 if usable is not None:
                return Decision(folded=usable, only=frozenset([usable]), merge=merge)
        return Decision(merge=merge)

    def forget(self, adapter: Adapter) -> None:
        pass


@dataclasses.dataclass
class Turns:
    """Folds in one after the other, the next as soon as one is whole; steps run on whole ones."""

    refs: Sequence[AdapterRef]
    turn: int = 0

    def decide(self, round: Round) -> Decision:
        usable = round.copy.usable
        self.turn += usable == self.refs[self.turn % len(self.refs)]
        return Decision(folded=usable, merge=self.refs[self.turn % len(self.refs)])

    def forget(self, adapter: Adapter) -> None:
        pass


def fold(engine: Engine, name: str) -> AdapterRef:
    """Makes the engine's copy one of this adapter, whole, and the adapter the last one placed; it
    is measured then, so that it may ride on a later copy, too."""
    modes = engine.parts.core.modes
    [ref] = [i.ref for i in engine.list_adapters() if i.current and i.ref.name == name]
    few = SamplingParams(max_tokens=2, ignore_eos=True)
    with decided(engine, Decision(merge=ref)):
        while True:
            engine.generate({"prompt_token_ids": [5]}, few, adapter=name, show_progress=False)
            if modes.orchestrator.copy.usable == ref and ref in modes.traits._known:
                return ref


def decided(engine: Engine, decision: Decision) -> contextlib.AbstractContextManager[None]:
    """All steps meanwhile run like this."""
    return ruled_by(engine, Fixed(decision))


@contextlib.contextmanager
def ruled_by(engine: Engine, policy: Policy) -> Iterator[None]:
    """This policy decides meanwhile."""
    orchestrator = engine.parts.core.modes.orchestrator
    orchestrator.set_policy(policy)
    try:
        yield
    finally:
        orchestrator.set_policy(make_policy("unmerged", max_wait_s=1))
