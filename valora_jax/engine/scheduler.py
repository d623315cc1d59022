"""Decides which tokens the next step computes: continuous batching over paged KV.

Running requests come first, those that decode before those with prompt left; then waiting ones are
admitted in order of arrival while rows, tokens and pages last. A request that lacks something else
lets a bounded number pass; one that the orchestrator holds back, any. When pages run out, the
request admitted last gives up its own, and computes its prompt and its answer so far again later.

The engine runs ahead: `plan` may be called before the tokens of the last plans are known.
"""

import collections
import enum
import heapq
from collections.abc import Callable, Sequence

from valora_jax.engine.kv_blocks import KVBlocks
from valora_jax.engine.plan import Chunk, Gate, Plan
from valora_jax.engine.request import FinishReason, Phase, Request
from valora_jax.errors import OutOfCapacityError, RequestTooLongError

type Serves = Callable[[Request], bool]


def everybody(request: Request) -> bool:
    """Refuses nobody."""
    return True


class _Admission(enum.Enum):
    ADMITTED = enum.auto()
    PASSED = enum.auto()  # others may go first
    BLOCKED = enum.auto()  # nobody may go first


class Scheduler:
    """Holds every request from `add` to `finish`; loses and starves none.

    The request that runs longest is never preempted while another runs, so it finishes; a waiting
    request is overtaken at most `max_overtaken` times; a preempted one waits in front.

    Attributes:
      max_request_tokens: prompt and answer together; what the pool can hold at most.
      preemptions: how many there were.
      finished: number of requests by reason.
    """

    def __init__(
        self,
        blocks: KVBlocks,
        *,
        max_tokens_per_step: int,
        max_requests: int,
        max_prefill_chunks: int,
        max_waiting: int,
        max_request_tokens: int,
        gates: Sequence[Gate] = (),
        max_overtaken: int = 64,
        lookahead: int = 32,
    ):
        """Makes an empty scheduler.

        Args:
          blocks: the KV pages.
          max_tokens_per_step: over all chunks of a plan.
          max_requests: that run at once; rows of the device's sampling state.
          max_prefill_chunks: of a plan, in `prefills`.
          max_waiting: requests in the queue.
          max_request_tokens: prompt and answer together.
          gates: what a request needs besides rows and pages; taken in this order.
          max_overtaken: admissions that a waiting request lets pass before it blocks the queue.
          lookahead: waiting requests that one plan passes over at most, to bound its cost.

        Raises:
          ValueError: a limit is below one, or a step cannot hold a token of every request.
        """
        limits = {
            "max_tokens_per_step": max_tokens_per_step,
            "max_requests": max_requests,
            "max_prefill_chunks": max_prefill_chunks,
            "max_waiting": max_waiting,
            "max_request_tokens": max_request_tokens,
            "lookahead": lookahead,
        }
        faults = [f"{name}={value} is below 1" for name, value in limits.items() if value < 1]
        if max_requests > max_tokens_per_step:
            faults.append(
                f"max_requests={max_requests} exceeds max_tokens_per_step={max_tokens_per_step}: "
                "a step must hold one token of every running request"
            )
        if faults:
            raise ValueError("\n  ".join(["the scheduler's limits are wrong:", *faults]))
        self.max_request_tokens = min(max_request_tokens, blocks.usable_pages * blocks.page_tokens)
        self.preemptions = 0
        self.finished: collections.Counter[FinishReason] = collections.Counter()
        self._blocks, self._gates = blocks, tuple(gates)
        self._max_tokens, self._max_prefill_chunks = max_tokens_per_step, max_prefill_chunks
        self._max_waiting, self._max_overtaken = max_waiting, max_overtaken
        self._lookahead = lookahead
        self._free_rows = list(range(max_requests))
        self._waiting: collections.deque[Request] = collections.deque()
        self._running: dict[Request, None] = {}  # in order of admission

    @property
    def waiting(self) -> tuple[Request, ...]:
        """In the order in which they will be admitted."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Request, ...]:
        """In order of admission."""
        return tuple(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def only_decodes(self) -> bool:
        """Whether the next plan admits nobody, computes no prompt and takes nobody's pages."""
        if self._waiting or any(r.remaining > 1 and not r.outputs_planned for r in self._running):
            return False
        return self._new_pages() <= self._blocks.free_pages

    @property
    def has_room(self) -> bool:
        """Whether rows and pages are free for who waits first, and more for all who run: steps in
        flight could only free what it does not need."""
        if not self._waiting or not self._free_rows or self._waiting[0].pending:
            return False
        pages = self._new_pages() + self._blocks.pages_for(self._waiting[0].total)
        return pages + len(self._running) <= self._blocks.free_pages

    def add(self, *requests: Request) -> None:
        """Queues new requests, all or none.

        Raises:
          RequestTooLongError: one could never run, however empty the engine.
          OutOfCapacityError: the queue has no room for them now.
        """
        for request in requests:
            if len(request.prompt_token_ids) + 1 > self.max_request_tokens:
                raise RequestTooLongError(
                    prompt_tokens=len(request.prompt_token_ids),
                    image_tokens=sum(image.length for image in request.images),
                    limit=self.max_request_tokens,
                )
        if len(self._waiting) + len(requests) > self._max_waiting:
            raise OutOfCapacityError(
                f"{len(self._waiting)} requests are waiting and the queue holds "
                f"{self._max_waiting}; there is no room for {len(requests)} more, try again later"
            )
        for request in requests:
            room = self.max_request_tokens - len(request.prompt_token_ids)
            request.output_limit = min(request.params.max_tokens or room, room)
            self._blocks.extend_digests(request)  # here, so that no plan pays for it
            self._waiting.append(request)

    def plan(self, serves: Serves = everybody) -> Plan | None:
        """Plans the next step and takes it as enqueued; None if there is nothing to do now.

        None while `has_work` means that tokens are pending, a gate is shut or `serves` refuses.

        Args:
          serves: whose tokens the step may compute; the others keep what they have.
        """
        plan = Plan([], [], [])
        for request in self._running:
            self._blocks.commit(request)
        self._plan_decodes(plan, serves)
        self._plan_prefills(plan, serves)
        if not plan.preempted:  # what was just given up must not go to a newcomer
            self._plan_admissions(plan, serves)
        return plan if plan.decodes or plan.prefills or plan.preempted else None

    def append_token(self, request: Request, token: int) -> bool:
        """Takes a pending token of a step that was read, whatever became of the request.

        The caller calls `finish` when the token ends the answer, or fills `output_limit`.

        Returns:
          False if the request finished while the step ran: the token is not part of the answer.
        """
        request.pending -= 1
        if request.phase is Phase.FINISHED:
            return False
        request.output_token_ids.append(token)
        return True

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Takes a request out and releases all it holds, in any phase and while a step runs.

        Does nothing to a finished request, so that an abort may come late.
        """
        if request.phase is Phase.FINISHED:
            return
        if request.phase is Phase.RUNNING:
            self._stop(request)
        else:
            self._waiting.remove(request)
        request.phase = Phase.FINISHED
        request.finish_reason = reason
        self.finished[reason] += 1

    def _new_pages(self) -> int:
        """That those who run lack for the tokens of the next step."""
        growing = (request for request in self._running if not request.outputs_planned)
        return sum(self._blocks.pages_for(r.total) - len(r.pages) for r in growing)

    def _plan_decodes(self, plan: Plan, serves: Serves) -> None:
        for request in tuple(self._running):
            # It may have been preempted for an earlier one by now.
            if request.phase is not Phase.RUNNING or request.outputs_planned or not serves(request):
                continue
            if request.remaining == 1 and self._grow(request, plan.preempted):
                self._add_chunk(plan, request, 1)

    def _plan_prefills(self, plan: Plan, serves: Serves) -> None:
        for request in self._running:
            if request.remaining > 1 and serves(request):
                budget = self._budget(plan)
                if budget == 0:
                    return
                self._add_chunk(plan, request, min(request.remaining, budget))

    def _plan_admissions(self, plan: Plan, serves: Serves) -> None:
        left: list[Request] = []  # in the queue, before those that were not looked at
        passed: list[Request] = []  # of them, who lacked something
        while self._waiting and self._free_rows and len(passed) < self._lookahead:
            budget = self._budget(plan)
            if budget == 0:
                break
            request = self._waiting[0]
            if not serves(request):
                left.append(self._waiting.popleft())
                continue
            admission = self._admit(request, uncut_room=budget if plan.prefills else None)
            if admission is _Admission.ADMITTED:
                self._waiting.popleft()
                self._add_chunk(plan, request, min(request.remaining, budget))
                for other in passed:
                    other.overtaken += 1
                if any(other.overtaken >= self._max_overtaken for other in passed):
                    break
            elif admission is _Admission.PASSED and request.overtaken < self._max_overtaken:
                passed.append(self._waiting.popleft())
                left.append(request)
            else:
                break
        self._waiting.extendleft(reversed(left))

    def _budget(self, plan: Plan) -> int:
        """Tokens that a prompt's next chunk may have."""
        if len(plan.prefills) == self._max_prefill_chunks:
            return 0
        return self._max_tokens - plan.tokens

    def _admit(self, request: Request, *, uncut_room: int | None) -> _Admission:
        """Makes a waiting request run, or changes nothing.

        A prompt that a step can hold is not cut to fill up the room that others leave: it would
        share two steps with strangers, and their adapters, instead of one, and end no sooner.
        """
        # Preempted with a step in flight: its token comes within a step, and pages are short.
        if request.pending or request.outputs_planned:
            return _Admission.BLOCKED
        matched = self._blocks.match(request)
        if self._blocks.awaits(request, matched):
            return _Admission.PASSED
        left = request.total - matched
        if uncut_room is not None and uncut_room < left <= self._max_tokens:
            return _Admission.BLOCKED
        request.computed = matched
        if not self._open_gates(request):
            request.computed = 0
            return _Admission.PASSED
        # Every running request may need a page soon: without them the newcomer would be preempted.
        if not self._blocks.admit(request, reserve_pages=len(self._running)):
            self._close_gates(request)
            request.computed = 0
            return _Admission.BLOCKED
        request.row = heapq.heappop(self._free_rows)
        request.phase = Phase.RUNNING
        self._running[request] = None
        return _Admission.ADMITTED

    def _open_gates(self, request: Request) -> bool:
        for i, gate in enumerate(self._gates):
            if not gate.acquire(request):
                for opened in reversed(self._gates[:i]):
                    opened.release(request)
                return False
        return True

    def _close_gates(self, request: Request) -> None:
        for gate in reversed(self._gates):
            gate.release(request)

    def _grow(self, request: Request, preempted: list[Request]) -> bool:
        """Gets pages for all tokens of a request; False if it had to give up its own for that."""
        while not self._blocks.allocate(request, request.total):
            victim = next(reversed(self._running))
            self._stop(victim)
            victim.phase = Phase.WAITING
            victim.computed = 0
            victim.preemptions += 1
            self._waiting.appendleft(victim)
            self.preemptions += 1
            preempted.append(victim)
            if victim is request:
                return False
        return True

    def _add_chunk(self, plan: Plan, request: Request, length: int) -> None:
        samples = length == request.remaining
        chunk = Chunk(request, request.computed, length, samples)
        (plan.decodes if length == 1 else plan.prefills).append(chunk)
        request.computed += length
        request.pending += samples

    def _stop(self, request: Request) -> None:
        """Takes from a running request all that it holds."""
        del self._running[request]
        self._blocks.commit(request)
        self._blocks.free(request)
        self._close_gates(request)
        assert request.row is not None
        heapq.heappush(self._free_rows, request.row)
        request.row = None
