"""Times what the host does before a step while a thousand requests of a thousand adapters wait.

Run it as `python -m benchmarks.round`. A round fetches adapters of those who wait first, asks the
policy, and plans. There is no device: steps take what the engine guesses before it has measured
any, uploads and merges take no time.
"""

import dataclasses
import importlib.metadata
import itertools
import math
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

from rich.console import Console
from rich.table import Table

from benchmarks.results import append, device, results_file
from valora_jax.config import PolicyName
from valora_jax.engine.adapters import LOOKAHEAD_REQUESTS
from valora_jax.engine.events import Events
from valora_jax.engine.kv_blocks import KVBlocks
from valora_jax.engine.mergeable import Traits
from valora_jax.engine.modes import Modes
from valora_jax.engine.orchestrator import Orchestrator
from valora_jax.engine.plan import Plan
from valora_jax.engine.policies import make_policy
from valora_jax.engine.request import Request
from valora_jax.engine.rounds import Adapter, AdapterTraits, Decision, chunks_of
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.engine.scheduler import Scheduler
from valora_jax.lora.host_store import AdapterRef
from valora_jax.lora.residency import Residency
from valora_jax.replay.simulation import RANK_64, step_limits

WAITING = 1000
ADAPTERS = 1000
REFS = [AdapterRef(name=f"adapter{i}", version=1) for i in range(ADAPTERS)]
ROWS = 64
PLACES = 32  # of adapters on the device
NEED = {"decoder.q": math.ceil(RANK_64.pages)}
PROMPT_TOKENS, OUTPUT_TOKENS = 640, 60
WARM_UP_ROUNDS, ROUNDS = 100, 500
AIM_MS = 1.0

type Spread = Literal["even", "hot"]  # each adapter in turn; nine in ten requests bring the first


class Places:
    """Adapters' places on a device that are filled at once; a gate."""

    def __init__(self) -> None:
        pages = {site: 1 + PLACES * number for site, number in NEED.items()}
        self.residency = Residency(pages, slots=PLACES)

    def prefetch(self, waiting: Iterable[Request]) -> None:
        """Does what the engine does before a step, see `EngineAdapters.prefetch`."""
        refs = [request.adapter for request in itertools.islice(waiting, LOOKAHEAD_REQUESTS)]
        wanted = dict.fromkeys(ref for ref in refs if ref is not None)
        self.residency.want(wanted)
        for ref in wanted:
            if ref not in self.residency:
                self.residency.place(ref, NEED)

    def acquire(self, request: Request) -> bool:
        assert request.adapter is not None
        if request.adapter not in self.residency:
            return False
        self.residency.acquire(request.adapter)
        return True

    def release(self, request: Request) -> None:
        assert request.adapter is not None
        self.residency.release(request.adapter)

    def pages(self, ref: AdapterRef) -> Mapping[str, int]:
        return NEED

    def slot_of(self, ref: AdapterRef) -> int | None:
        return self.residency.slot_of(ref)


class Measured(Traits):
    """Traits of adapters of rank 64, all measured and fit to be merged."""

    def __call__(self, ref: Adapter) -> AdapterTraits:
        return RANK_64


class Case:
    """A policy and the requests that it decides about.

    Attributes:
      scheduler: whose queue is full before each round.
      places: of adapters.
    """

    def __init__(self, policy: PolicyName, spread: Spread):
        limits = step_limits(max_requests=ROWS)
        self.places = Places()
        self.scheduler = Scheduler(
            KVBlocks(num_pages=2048, page_tokens=64, enable_prefix_cache=True),
            max_tokens_per_step=limits.max_tokens_per_step,
            max_requests=ROWS,
            max_prefill_chunks=limits.max_prefill_chunks,
            max_waiting=WAITING,
            max_request_tokens=2048,
            gates=[self.places],
        )
        how = dict(pools=dict, events=Events())
        traits = Measured(self.places, base=None, **how)
        self._orchestrator = Orchestrator(
            make_policy(policy, max_wait_s=0.5), limits=limits, traits=traits
        )
        self._now_s = 0.0
        self._modes = Modes(
            self._orchestrator,
            traits,
            self.places,
            None,
            merge_chunk_ms=limits.merge_chunk_ms,
            clock=lambda: self._now_s,
            **how,
        )
        self._requests = _requests(spread)
        self._refill()

    def round(self) -> tuple[float, Plan]:
        """Milliseconds of a round, and what it planned; the step follows, untimed."""
        start_s = time.perf_counter()
        self.places.prefetch(self.scheduler.waiting)
        plan, decision = self._modes.plan(self.scheduler)
        ms = 1e3 * (time.perf_counter() - start_s)
        assert plan is not None
        self._run(plan, decision)
        return ms, plan

    def _run(self, plan: Plan, decision: Decision) -> None:
        """Lets the step end, and as many come as were admitted."""
        chunks = chunks_of((chunk.request, chunk.length) for chunk in plan.chunks)
        load = self._orchestrator.load_of(chunks, decision.folded)
        self._now_s += self._orchestrator.costs.estimate_ms(load) / 1e3
        if decision.merge is not None:
            self._orchestrator.copied(decision.merge, 1.0)
        for chunk in plan.chunks:
            chunk.request.waiting_since_s = self._now_s
            if chunk.samples:
                self.scheduler.append_token(chunk.request, 7)
                if chunk.request.outputs_planned:
                    self.scheduler.finish(chunk.request, "length")
        self._refill()

    def _refill(self) -> None:
        for _ in range(WAITING - len(self.scheduler.waiting)):
            request = next(self._requests)
            request.waiting_since_s = self._now_s
            self.scheduler.add(request)


def _requests(spread: Spread) -> Iterator[Request]:
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    for i in itertools.count():
        ref = REFS[0 if spread == "hot" and i % 10 else i % ADAPTERS]
        yield Request(
            id=str(i), prompt_token_ids=[i % 5000 + 1] * PROMPT_TOKENS, params=params, adapter=ref
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Of a round, in milliseconds."""

    median_ms: float
    p99_ms: float


def measure(case: Case) -> Timing:
    for _ in range(WARM_UP_ROUNDS):
        case.round()
    taken = [case.round()[0] for _ in range(ROUNDS)]
    return Timing(median_ms=statistics.median(taken), p99_ms=statistics.quantiles(taken, n=100)[-1])


def record(policy: PolicyName, spread: Spread, timing: Timing) -> dict[str, Any]:
    """A line of the results file."""
    return {
        "bench": "round",
        "policy": policy,
        "spread": spread,
        "waiting": WAITING,
        "adapters": ADAPTERS,
        "rows": ROWS,
        "rounds": ROUNDS,
        **dataclasses.asdict(timing),
        "aim_ms": AIM_MS,
        "device": device(),
        "versions": {
            "valora-jax": importlib.metadata.version("valora-jax"),
            "python": platform.python_version(),
        },
        "command": " ".join(["python", "-m", "benchmarks.round", *sys.argv[1:]]),
    }


def main() -> None:
    table = Table("policy", "spread", "median ms", "p99 ms", f"aim <= {AIM_MS:g} ms")
    records = []
    for policy in get_args(PolicyName):
        for spread in get_args(Spread.__value__):
            timing = measure(Case(policy, spread))
            met = "met" if timing.p99_ms <= AIM_MS else "missed"
            table.add_row(policy, spread, f"{timing.median_ms:.2f}", f"{timing.p99_ms:.2f}", met)
            records.append(record(policy, spread, timing))
    Console().print(table)
    append(results_file("round"), records)


if __name__ == "__main__":
    main()
