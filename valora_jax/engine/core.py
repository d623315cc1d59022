"""The engine's loop: plan, enqueue, read an earlier step, hand tokens to their answers.

Steps are in flight ahead of the host: step n+1 is enqueued before step n's tokens are read, and
behind decodes that nothing in flight decides on, `steps_ahead` of them are. Not for several threads
at once; `Engine` locks.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from valora_jax.engine.adapters import EngineAdapters
from valora_jax.engine.answer import Answer, PromptScores
from valora_jax.engine.image_cache import ImageCache
from valora_jax.engine.modes import Modes
from valora_jax.engine.outputs import RequestMetrics
from valora_jax.engine.plan import Plan
from valora_jax.engine.request import FinishReason, Request
from valora_jax.engine.rounds import EVERYBODY_UNMERGED, Decision
from valora_jax.engine.runner import InFlight, Runner
from valora_jax.engine.scheduler import Scheduler
from valora_jax.media.tokenizer import Tokenizer


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class Job:
    """A request in the engine and what becomes of it.

    Attributes:
      request: what the scheduler sees.
      pixels: of its images, in order.
      answer: its text.
      scores: of its prompt; None where nobody asked.
      classes: logits of its adapter's task head, where it asked for them.
      error: what ended it, if something failed.
    """

    request: Request
    pixels: Sequence[np.ndarray]
    answer: Answer
    scores: PromptScores | None = None
    classes: np.ndarray | None = None
    error: Exception | None = None
    first_token_s: float | None = None
    finished_s: float | None = None

    @property
    def finished(self) -> bool:
        return self.answer.finish_reason is not None

    def metrics(self) -> RequestMetrics:
        return RequestMetrics(
            arrival_s=self.request.arrival_s,
            first_token_s=self.first_token_s,
            finished_s=self.finished_s,
            cached_tokens=self.request.cached_tokens,
            preemptions=self.request.preemptions,
        )


class EngineCore:
    """Moves jobs from `add` to their end. `on_progress` hears of each job that has news."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        images: ImageCache,
        adapters: EngineAdapters | None,
        *,
        modes: Modes | None = None,
        tokenizer: Tokenizer,
        steps_ahead: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`steps_ahead` is how many steps may be in flight while an earlier one is read; `modes` is
        None where no step uses adapters."""
        self.scheduler, self.images, self.adapters = scheduler, images, adapters
        self.modes = modes
        self._runner, self._tokenizer, self._clock = runner, tokenizer, clock
        self._steps_ahead = steps_ahead
        self._jobs: dict[Request, Job] = {}
        self._in_flight: collections.deque[InFlight] = collections.deque()
        # Row of the sampler's state -> whose counts it has: (request, how often preempted).
        self._counted: dict[int | None, tuple[Request, int]] = {}

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    def add(self, jobs: Collection[Job]) -> None:
        """Queues jobs, all or none; raises what `Scheduler.add` raises."""
        self.scheduler.add(*(job.request for job in jobs))
        self._jobs |= {job.request: job for job in jobs}

    def abort(self, job: Job) -> None:
        """Ends a job now, in any phase; its text so far stays. Too late is no mistake."""
        if not job.finished:
            self._finish(job, job.answer.end("abort"))

    def step(self) -> list[Job]:
        """Enqueues the next step, reads the oldest one if enough are in flight; returns the jobs
        that have news."""
        ahead, news = self._ahead(), []
        if len(self._in_flight) <= ahead:
            plan, decision = self._plan()
            news += self._fail_unreadable()
            if plan is not None and plan.tokens:
                self._enqueue(plan, decision)
                if len(self._in_flight) <= ahead:
                    return news
        if self._in_flight:
            news += self._take(self._in_flight.popleft())
        elif self.adapters and not news:
            self.adapters.wait()  # nothing else can change what the next plan finds
        return news

    def _ahead(self) -> int:
        """How many steps may be in flight when the next is planned.

        Several while they only decode, also when somebody comes who has room: to enqueue a prompt
        may take the host longer than the device takes for a decode. Else one: ended requests have
        made room by then, and the device, which takes steps in order, begins no later.
        """
        if self.scheduler.only_decodes:
            return self._steps_ahead
        prompts = any(step.plan.prefills for step in self._in_flight)
        return self._steps_ahead if self.scheduler.has_room and not prompts else 1

    def _plan(self) -> tuple[Plan | None, Decision]:
        if self.adapters:
            self.adapters.prefetch(self.scheduler.waiting)
        if self.modes is None:
            return self.scheduler.plan(), EVERYBODY_UNMERGED
        return self.modes.plan(self.scheduler)

    def _fail_unreadable(self) -> list[Job]:
        """Ends jobs whose adapter cannot be read again."""
        failed = []
        for request, error in self.adapters.take_failures() if self.adapters else ():
            job = self._jobs[request]
            job.error = error
            self._finish(job, job.answer.end("abort"))
            failed.append(job)
        return failed

    def _enqueue(self, plan: Plan, decision: Decision) -> None:
        began_s, traces = self._clock(), self._runner.traces
        encoded = self._encode_images()
        for chunk in plan.chunks:
            self._count_tokens(chunk.request)
        folded = self.modes.fold(decision) if self.modes else None
        self._in_flight.append(self._runner.execute(plan, folded))
        if self.modes:
            compiled = self._runner.traces > traces
            self.modes.enqueued(
                plan, decision, folded=folded, encoded=encoded, began_s=began_s, compiled=compiled
            )
        now_s = self._clock()
        for chunk in plan.chunks:
            chunk.request.waiting_since_s = now_s
            images = chunk.request.images
            if images and chunk.request.computed >= images[-1].end:
                self.images.release(chunk.request)

    def _encode_images(self) -> Mapping[Request, int]:
        """Enqueues the features that the next step needs; returns how many, by request."""
        new = self.images.take_new()
        self._runner.encode(
            [
                (
                    self._jobs[image.request].pixels[image.index],
                    image.slot,
                    self.adapters.vision_slot(image.request) if self.adapters else -1,
                )
                for image in new
            ]
        )
        return collections.Counter(image.request for image in new)

    def _count_tokens(self, request: Request) -> None:
        """Once each time that a request with penalties is admitted."""
        admission = (request, request.preemptions)
        if request.params.has_penalties and self._counted.get(request.row) != admission:
            self._runner.set_counts(request)
            self._counted[request.row] = admission

    def _take(self, step: InFlight) -> list[Job]:
        """Reads a step's results into the jobs' answers."""
        on_time = not step.sampled.is_ready()
        sampled = step.sampled.to_numpy()
        now_s = self._clock()
        for chunk in step.plan.chunks:
            chunk.request.waiting_since_s = now_s
        if self.modes:
            self.modes.ended(on_time=on_time)
        self._take_scores(step)
        news = []
        for row, request in enumerate(step.requests):
            if not self.scheduler.append_token(request, int(sampled.token_S[row])):
                continue  # it finished while the step ran
            job = self._jobs[request]
            if request in step.classes:
                job.classes = np.asarray(step.classes[request])[0]
            if job.first_token_s is None:
                job.first_token_s = self._clock()
            if (reason := job.answer.add(sampled, row)) is not None:
                self._finish(job, reason)
            news.append(job)
        return news

    def _take_scores(self, step: InFlight) -> None:
        if step.scores is None:
            return
        logits_TV, following = step.read_scores()
        row = 0
        for chunk in step.plan.chunks:
            job = self._jobs.get(chunk.request)
            if job is not None and job.scores is not None:
                job.scores.add(
                    logits_TV,
                    following,
                    row=row,
                    position=chunk.start,
                    length=chunk.length,
                    tokenizer=self._tokenizer,
                )
            row += chunk.length

    def _finish(self, job: Job, reason: FinishReason) -> None:
        request = job.request
        self.scheduler.finish(request, reason)
        if self.adapters and request.adapter is not None:
            self.adapters.let_go(request.adapter)
        del self._jobs[request]
        job.finished_s = self._clock()
