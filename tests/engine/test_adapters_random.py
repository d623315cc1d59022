"""Random traffic over more adapters than places, with a real scheduler: everybody gets theirs."""

import random

import pytest

from tests.engine.bare_adapters import VISION, WIDE, A, B, bare_adapters, loaded, on_device, staged
from tests.engine.simulated_device import SimulatedDevice
from valora_jax.engine.adapters import EngineAdapters
from valora_jax.engine.kv_blocks import KVBlocks
from valora_jax.engine.request import Phase, Request
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.engine.scheduler import Scheduler

PAGE = 4
NAMES = [A, B, VISION, WIDE, "a02_attn_suffix_r4", "a09_lm_head_saved", "a10_new_head"]


class Loop:
    """The engine's loop around a simulated device, one step in flight."""

    def __init__(self, adapters: EngineAdapters, *, seed: int):
        self.random, self.adapters = random.Random(seed), adapters
        self.scheduler = Scheduler(
            KVBlocks(num_pages=40, page_tokens=PAGE),
            max_tokens_per_step=16,
            max_requests=4,
            max_prefill_chunks=2,
            max_waiting=100,
            max_request_tokens=40,
            gates=[adapters],
            max_overtaken=8,
        )
        self.device = SimulatedDevice(self.scheduler, PAGE)
        self.held: list[Request] = []

    def add(self) -> None:
        name = self.random.choice([*NAMES, None])
        params = SamplingParams(max_tokens=self.random.randint(1, 9))
        request = Request(
            id="r",
            prompt_token_ids=[self.random.randint(1, 9) for _ in range(self.random.randint(1, 20))],
            params=params,
            adapter=None if name is None else self.adapters.hold(name),
        )
        self.scheduler.add(request)
        self.held.append(request)

    def turn(self) -> None:
        self.adapters.prefetch(self.scheduler.waiting)
        plan = self.scheduler.plan()
        if plan is not None and plan.tokens:
            for chunk in (*plan.decodes, *plan.prefills):
                self.check_place(chunk.request)
            self.device.run(plan)
        if self.device.unread:
            self.device.read_oldest()
        elif plan is None:
            self.adapters.wait()
        for request in [r for r in self.held if r.phase is Phase.FINISHED]:
            self.let_go(request)

    def abort(self) -> None:
        request = self.random.choice(self.held)
        self.scheduler.finish(request, "abort")
        self.let_go(request)

    def let_go(self, request: Request) -> None:
        self.held.remove(request)
        if request.adapter is not None:
            self.adapters.let_go(request.adapter)

    def check_place(self, request: Request) -> None:
        slot = -1 if request.adapter is None else self.adapters.slot_of(request.adapter)
        assert self.adapters.slot(request) == slot


@pytest.mark.parametrize("seed", range(8))
def test_everybody_gets_their_adapter_whatever_else_happens(seed):
    with bare_adapters() as make:
        adapters = make(max_adapters=3, lora_pages=6, host_adapter_bytes=0)
        for name in NAMES:
            loaded(adapters, name)
        loop, pinned = Loop(adapters, seed=seed), None
        for _ in range(60):
            event = loop.random.choice(["add", "add", "abort", "reload", "pin", "turn", "turn"])
            if event == "add":
                loop.add()
            elif event == "abort" and loop.held:
                loop.abort()
            elif event == "reload":
                name = loop.random.choice(NAMES)
                loaded(adapters, name)
            elif event == "pin":
                if pinned is not None:
                    adapters.unpin(pinned)
                pinned = loop.random.choice([A, B, VISION])
                adapters.pin(pinned)
            loop.turn()
        for _ in range(5000):
            if not loop.held:
                break
            loop.turn()
        assert loop.held == []
        assert (adapters.residency.in_use, adapters.take_failures()) == (0, [])
        for _ in range(2):  # staged, then placed, unless it is there
            adapters.prefetch([])
            staged(adapters)
        assert pinned is None or pinned in on_device(adapters)
