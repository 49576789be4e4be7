"""What the engine's worker does, step by step: plan, run, choose, hand out. Single-threaded; owns the scheduler, the
pages and the runner. Knows no queue and no lock.

What fails in one request's processing ends that request alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from squawq.engine.pages import PagePool
from squawq.engine.request import Chunk, FinishReason, Output, Runner
from squawq.engine.scheduler import Scheduler, Sequence
from squawq.engine.sequence import Generation, Job

MAX_MESSAGE = 500


def _nothing(_: Output) -> None:
    pass


class Loop:
    """Runs jobs on a runner. `started` and `ended` are called once for each job."""

    def __init__(
        self,
        runner: Runner,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        prefix_caching: bool,
        started: Callable[[Job], None] = lambda _: None,
        ended: Callable[[Job], None] = lambda _: None,
    ) -> None:
        self.pool = PagePool(runner.num_pages, runner.page_size)
        self.scheduler = Scheduler(self.pool, max_batch_tokens, max_sequences, prefix_caching)
        self.jobs: dict[str, Job] = {}
        self.steps = self.tokens_generated = self.prompt_tokens_computed = 0
        self.runner_seconds = self.step_seconds = 0.0
        self._runner = runner
        self._owners: dict[Sequence, tuple[Job, Generation]] = {}
        self._started = started
        self._ended = ended

    def add(self, job: Job) -> None:
        """Queue a request's sequences."""
        self.jobs[job.request.id] = job
        for generation in job.generations:
            self._owners[generation.place] = (job, generation)
            self.scheduler.add(generation.place)

    def abort(self, request_id: str) -> None:
        """End a request, if it is under way."""
        if job := self.jobs.get(request_id):
            self._end(job, FinishReason.ABORT)

    def end_all(self, reason: FinishReason, why: str | None = None) -> None:
        """End every request."""
        for job in list(self.jobs.values()):
            self._end(job, reason, why)

    def step(self) -> None:
        """Run the next tokens of what is under way, and hand out what came of it. Nothing under way: nothing done."""
        if not self.jobs:
            return
        began = time.perf_counter()
        shares = self.scheduler.plan()
        assert shares, "requests are under way and none goes on"
        batch = [self._chunk(place, count) for place, count in shares]
        ran = time.perf_counter()
        try:
            rows = self._runner.run(batch)
        except BaseException as error:  # Rust's panics too: none may end the worker
            for job in {id(job): job for job, _ in (self._owners[place] for place, _ in shares)}.values():
                self._end(job, FinishReason.ERROR, _message(error))
            return
        self.runner_seconds += time.perf_counter() - ran
        for (place, count), chunk, logits in zip(shares, batch, rows, strict=True):
            if not place.ended:  # a sibling may have ended it in this very step
                self.prompt_tokens_computed += max(0, min(count, place.prompt - chunk.start))
                self.scheduler.advance(place, count)
                self._take(place, chunk, logits)
        self.steps += 1
        self.step_seconds += time.perf_counter() - began

    def _chunk(self, place: Sequence, count: int) -> Chunk:
        start = place.computed
        logits = count if place.score else int(count == place.left)
        job = self._owners[place][0]
        if not job.started:
            job.started = True
            self._started(job)
        return Chunk(place.tokens[start : start + count], start, place.pages, logits)

    def _take(self, place: Sequence, chunk: Chunk, logits: NDArray[np.float32]) -> None:
        """Let a sequence make of its logits what it can."""
        job, generation = self._owners[place]
        try:
            if place.score:
                generation.score(chunk.start, logits)
            if place.left:
                return
            output = generation.step(logits[-1])
        except BaseException as error:
            self._end(job, FinishReason.ERROR, _message(error))
            return
        self.tokens_generated += 1
        self._give(job, generation, output)

    def _give(self, job: Job, generation: Generation, output: Output) -> None:
        """Hand out an output; a sink that raises has hung up."""
        if output.finish:
            self.scheduler.end(generation.place)
            del self._owners[generation.place]
        if job.ended and self.jobs.pop(job.request.id, None) is not None:
            self._ended(job)  # before its last output: whoever gets that may use its id again
        try:
            job.give(output)
        except BaseException:
            job.sink = _nothing
            self._end(job, FinishReason.ABORT)

    def _end(self, job: Job, reason: FinishReason, why: str | None = None) -> None:
        for generation in job.generations:
            if generation.finish is None:
                try:
                    output = generation.end(reason, why)
                except BaseException:  # the tokenizer failed on what was held back
                    output = Output(job.request.id, generation.index, finish=reason, stop_reason=why)
                self._give(job, generation, output)


def _message(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:MAX_MESSAGE]
