"""What steps and merges took, told from when they were enqueued and when they were read, and who
hears of them."""

import dataclasses
import logging

import pytest

from tests.fixed_policy import Fixed
from valora_jax.engine.events import Events, MergeBegun, MergeInterrupted, MergeWhole, StepRan
from valora_jax.engine.modes import Modes
from valora_jax.engine.orchestrator import Orchestrator
from valora_jax.engine.plan import Chunk, Folded, Plan
from valora_jax.engine.request import Request
from valora_jax.engine.rounds import EVERYBODY_UNMERGED, AdapterTraits, Decision, StepLimits
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.lora.host_store import AdapterRef
from valora_jax.lora.mode import Mode

HOT, COLD = (AdapterRef(name=name, version=1) for name in ("hot", "cold"))
LAYERS = 8


@dataclasses.dataclass
class Device:
    """Adapters that are placed, and a copy that notes what is filled."""

    slots: dict = dataclasses.field(default_factory=lambda: {HOT: 2, COLD: 0})
    filled: list = dataclasses.field(default_factory=list)
    layers: int = LAYERS

    def slot_of(self, ref):
        return self.slots.get(ref)

    def pages(self, ref):
        return {"decoder.q": 1} | ({"head": 1} if ref == COLD else {})

    def fill(self, nth, pools, *, slot):
        self.filled.append((nth, slot))


class Knows:
    """Traits, of which nothing is asked."""

    def forget(self, ref):
        pass


class Loop:
    """Modes on a clock that the test moves."""

    def __init__(self):
        self.now_s, self.device, self.heard = 100.0, Device(), []
        self.events = Events()
        self.events.listen(self.heard.append)
        limits = StepLimits(
            max_requests=4,
            max_tokens_per_step=64,
            max_prefill_chunks=4,
            bucket=lambda decodes, prompt: (decodes, prompt),
        )
        self.orchestrator = Orchestrator(
            Fixed(EVERYBODY_UNMERGED), limits=limits, traits=lambda _: AdapterTraits(pages=1.0)
        )
        self.modes = Modes(
            self.orchestrator,
            Knows(),
            self.device,
            self.device,
            pools=dict,
            merge_chunk_ms=2.0,
            events=self.events,
            clock=lambda: self.now_s,
        )
        self.learnt = []
        self.orchestrator.costs.observe = lambda load, ms: self.learnt.append(ms)

    def enqueue(self, *, merge=None, adapter=None, folded=None, compiled=False, host_ms=0.0):
        began_s = self.now_s
        self.now_s += host_ms / 1e3
        request = Request(
            id="r", prompt_token_ids=[1, 2, 3], params=SamplingParams(), adapter=adapter
        )
        plan = Plan([Chunk(request, 2, 1, True)], [], [])
        self.modes.enqueued(
            plan,
            Decision(folded=folded, merge=merge),
            folded=None if folded is None else Folded(slot=2, changes_head=False),
            encoded={},
            began_s=began_s,
            compiled=compiled,
        )

    @property
    def ran(self) -> list[StepRan]:
        return [event for event in self.heard if isinstance(event, StepRan)]

    def read(self, *, after_ms, on_time=True):
        self.now_s += after_ms / 1e3
        self.modes.ended(on_time=on_time)


@pytest.fixture
def loop():
    return Loop()


def test_a_step_takes_from_the_end_of_the_one_before_to_its_own(loop):
    loop.enqueue()
    loop.now_s += 1e-3
    loop.enqueue()
    loop.read(after_ms=5)
    loop.read(after_ms=7)
    assert [step.ms for step in loop.ran] == pytest.approx([6, 7])
    assert loop.learnt == pytest.approx([6, 7])
    assert loop.orchestrator.seconds[Mode.UNMERGED] == pytest.approx(0.013)


def test_a_step_after_a_pause_takes_from_when_the_host_began_with_it_and_its_images(loop):
    loop.enqueue()
    loop.read(after_ms=5)
    loop.now_s += 10
    loop.enqueue(host_ms=3)
    loop.read(after_ms=4)
    assert loop.learnt == pytest.approx([5, 7])


def test_what_ended_before_it_was_read_teaches_nothing_nor_does_the_step_that_followed_it(loop):
    for _ in range(4):
        loop.enqueue()
    loop.read(after_ms=5)
    loop.read(after_ms=50, on_time=False)
    loop.read(after_ms=1)  # may have begun long before the last was read
    loop.read(after_ms=6)
    assert loop.learnt == pytest.approx([5, 6])
    assert sum(loop.orchestrator.seconds.values()) == pytest.approx(0.062)


def test_a_step_that_was_compiled_for_teaches_nothing(loop):
    loop.enqueue(compiled=True)
    loop.read(after_ms=9000)
    assert loop.learnt == []


def test_a_merge_is_cut_into_pieces_of_the_time_that_may_pass(loop):
    loop.orchestrator.costs.merge_ms = 8.0
    for _ in range(5):
        loop.enqueue(merge=HOT)
    # A fifth asks for nothing new: the copy is whole.
    assert loop.device.filled == [(nth, 2) for nth in range(LAYERS)]
    assert loop.orchestrator.copy.usable == HOT
    assert loop.orchestrator.switches == 1


def test_another_adapter_begins_anew(loop):
    loop.orchestrator.costs.merge_ms = 8.0
    loop.enqueue(merge=HOT)
    loop.enqueue(merge=COLD)
    assert loop.device.filled == [(0, 2), (1, 2), (0, 0), (1, 0)]
    assert loop.orchestrator.copy.fraction == 0.25
    assert (loop.orchestrator.switches, loop.orchestrator.interrupted) == (2, 1)


def told(loop) -> list[tuple]:
    """What became of merges: the kind of event and whose."""
    return [(type(event), event.adapter) for event in loop.heard if not isinstance(event, StepRan)]


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_merge_is_told_when_it_begins_and_when_it_is_whole(loop, said):
    loop.orchestrator.costs.merge_ms = 8.0
    for _ in range(3):
        loop.enqueue(merge=HOT)
    assert told(loop) == [(MergeBegun, HOT)]
    for _ in range(2):
        loop.enqueue(merge=HOT)
    assert told(loop) == [(MergeBegun, HOT), (MergeWhole, HOT)]
    loop.enqueue(merge=COLD)
    assert told(loop)[2:] == [(MergeBegun, COLD)]
    assert said() == []


def test_a_merge_that_another_one_replaces_is_told_and_logged(loop, said):
    loop.orchestrator.costs.merge_ms = 8.0
    loop.enqueue(merge=HOT)
    loop.enqueue(merge=COLD)
    assert told(loop) == [(MergeBegun, HOT), (MergeInterrupted, HOT), (MergeBegun, COLD)]
    assert said() == [
        "the merge of adapter 'hot' version 1 was interrupted at 25%: another takes the copy"
    ]


@pytest.mark.parametrize(
    ("chunks", "end", "line"),
    [
        (1, MergeInterrupted, "the merge of {} was interrupted at 25%: it was unloaded, and the "),
        (4, MergeWhole, "{} was unloaded while folded in: its copy is dropped, and steps run on "),
    ],
)
def test_a_version_that_goes_takes_its_copy_along(loop, said, chunks, end, line):
    loop.orchestrator.costs.merge_ms = 8.0
    for _ in range(chunks):
        loop.enqueue(merge=HOT)
    loop.modes.forget(COLD)
    assert said() == []
    loop.modes.forget(HOT)
    assert told(loop) == [(MergeBegun, HOT), (end, HOT)]
    [got] = said()
    assert got.startswith(line.format("adapter 'hot' version 1"))


def test_a_step_that_ran_tells_its_mode_and_whom_it_served(loop):
    loop.enqueue(adapter=HOT, folded=HOT)
    loop.read(after_ms=5)
    [step] = loop.ran
    assert (step.mode, step.decision) == (Mode.MERGED, Decision(folded=HOT))
    assert [request.adapter for request in step.requests] == [HOT]


def test_what_steps_take_longer_after_pieces_is_the_merge(loop):
    costs = loop.orchestrator.costs
    costs.merge_ms, costs.estimate_ms = 8.0, lambda load: 5.0
    for _ in range(5):
        loop.enqueue(merge=HOT)
    loop.read(after_ms=5)
    for _ in range(4):
        loop.read(after_ms=5 + 3)
    assert loop.learnt == pytest.approx([5])
    assert costs.merge_ms == pytest.approx(8 + 0.3 * (12 - 8))


@pytest.mark.parametrize("unclear", ["late", "paused"])
def test_a_merge_of_which_a_part_cannot_be_told_teaches_nothing(loop, unclear):
    costs = loop.orchestrator.costs
    costs.merge_ms, costs.estimate_ms = 8.0, lambda load: 5.0
    for i in range(5):
        if unclear == "paused" and i == 3:  # pieces ran while no step was in flight
            loop.read(after_ms=5)
            loop.read(after_ms=8)
            loop.read(after_ms=8)
            loop.now_s += 1
        loop.enqueue(merge=HOT)
    while loop.modes._in_flight:
        loop.read(after_ms=8, on_time=unclear == "paused")
    assert costs.merge_ms == 8.0


def test_an_adapter_that_is_not_placed_is_neither_merged_nor_used(loop):
    del loop.device.slots[HOT]
    loop.enqueue(merge=HOT)
    assert loop.device.filled == []
    assert loop.orchestrator.copy.adapter is None
    assert loop.modes.fold(Decision(folded=HOT)) is None


def test_rows_are_counted_by_how_they_ran(loop):
    for adapter in (HOT, HOT, COLD, None):
        loop.enqueue(adapter=adapter, folded=HOT)
    loop.enqueue(adapter=COLD)
    assert loop.modes.tokens == {Mode.MERGED: 2, Mode.MIXTURE: 2, Mode.UNMERGED: 1}


def test_rows_of_an_adapter_with_a_head_need_more_than_its_weights(loop):
    assert loop.modes.fold(Decision(folded=HOT)) == Folded(slot=2, changes_head=False)
    assert loop.modes.fold(Decision(folded=COLD)) == Folded(slot=0, changes_head=True)
    assert loop.modes.fold(EVERYBODY_UNMERGED) is None
