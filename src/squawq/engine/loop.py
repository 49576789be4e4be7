"""The engine's step: plan, run the model, process the results, send outputs. Single-threaded; owns the scheduler, the
page pool and the runner.

An error in one request's processing ends that request alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from squawq.backends.sampling import Chunk, StepOutput
from squawq.engine.config import EngineConfig
from squawq.engine.pages import PagePool
from squawq.engine.protocol import Runner
from squawq.engine.request import FinishReason, Output
from squawq.engine.scheduler import Scheduler, Sequence
from squawq.engine.sequence import RequestState, SequenceState

MAX_MESSAGE = 500


def _nothing(_: Output) -> None:
    pass


class Loop:
    """Runs requests on a runner. `started` and `ended` are called once for each request."""

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        *,
        started: Callable[[RequestState], None] = lambda _: None,
        ended: Callable[[RequestState], None] = lambda _: None,
    ) -> None:
        self.pool = PagePool(runner.num_pages, runner.page_size)
        self.scheduler = Scheduler(self.pool, config.step_tokens, config.max_num_seqs, config.prefix_caching)
        self.requests: dict[str, RequestState] = {}
        self.steps = self.tokens_generated = self.prompt_tokens_computed = 0
        self.runner_seconds = self.step_seconds = 0.0
        self._runner = runner
        self._owners: dict[Sequence, tuple[RequestState, SequenceState]] = {}
        self._started = started
        self._ended = ended

    def add(self, request: RequestState) -> None:
        """Queue a request's sequences."""
        self.requests[request.id] = request
        for state in request.states:
            self._owners[state.sequence] = (request, state)
            self.scheduler.add(state.sequence)

    def abort(self, request_id: str) -> None:
        """Abort a request, if it is in flight."""
        if request := self.requests.get(request_id):
            self._end(request, FinishReason.ABORT)

    def end_all(self, reason: FinishReason, why: str | None = None) -> None:
        """End every request."""
        for request in list(self.requests.values()):
            self._end(request, reason, why)

    def step(self) -> None:
        """Run one step of all requests in flight and send their outputs; no-op without requests."""
        if not self.requests:
            return
        began = time.perf_counter()
        shares = self.scheduler.plan()
        assert shares, "requests are in flight and none was scheduled"
        batch = [self._chunk(sequence, count) for sequence, count in shares]
        ran = time.perf_counter()
        try:
            results = self._runner.step(batch)
        except BaseException as error:  # Rust's panics too: none may end the worker
            failed = dict.fromkeys(self._owners[sequence][0] for sequence, _ in shares)
            for request in failed:
                self._end(request, FinishReason.ERROR, _message(error))
            return
        self.runner_seconds += time.perf_counter() - ran
        for (sequence, count), chunk, result in zip(shares, batch, results, strict=True):
            if not sequence.ended:  # a sibling may have ended it in this very step
                self.prompt_tokens_computed += max(0, min(count, sequence.prompt - chunk.start))
                self.scheduler.advance(sequence, count)
                self._take(sequence, chunk, result)
        self.steps += 1
        self.step_seconds += time.perf_counter() - began

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        request, state = self._owners[sequence]
        if not request.started:
            request.started = True
            self._started(request)
        return state.chunk(count)

    def _take(self, sequence: Sequence, chunk: Chunk, result: StepOutput) -> None:
        """Process a sequence's result."""
        request, state = self._owners[sequence]
        try:
            if result.error is not None:
                raise result.error
            if sequence.score:
                state.score(chunk.start, result.prompt_logprobs)
            if result.token is None:
                return
            output = state.step(result.token, result.logprob)
        except BaseException as error:
            self._end(request, FinishReason.ERROR, _message(error))
            return
        self.tokens_generated += 1
        self._deliver(request, state, output)

    def _deliver(self, request: RequestState, state: SequenceState, output: Output) -> None:
        """Send an output to its sink; a sink that raises aborts its request."""
        if output.finish:
            self.scheduler.end(state.sequence)
            del self._owners[state.sequence]
        if request.ended and self.requests.pop(request.id, None) is not None:
            self._ended(request)  # before its last output: its receiver may reuse the id
        try:
            request.deliver(output)
        except BaseException:
            request.sink = _nothing
            self._end(request, FinishReason.ABORT)

    def _end(self, request: RequestState, reason: FinishReason, why: str | None = None) -> None:
        for state in request.states:
            if state.finish is None:
                try:
                    output = state.end(reason, why)
                except BaseException:  # the tokenizer failed on what was held back
                    output = Output(request.id, state.index, finish=reason, stop_reason=why)
                self._deliver(request, state, output)


def _message(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:MAX_MESSAGE]
