"""The engine: takes requests from any thread, runs them step by step in its own thread, passes outputs to callbacks."""

from __future__ import annotations

import math
import os
import queue
import random
import secrets
import threading
import time
from collections import abc, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from squawq.backends.sampling import Chunk, StartedStep, StepOutput
from squawq.engine.config import EngineConfig
from squawq.engine.grammar import GrammarCompiler, Matcher
from squawq.engine.pages import PagePool
from squawq.engine.protocol import InferenceEngine, Runner, Stats
from squawq.engine.request import FinishReason, Output, Request, Sink
from squawq.engine.scheduler import Scheduler, Sequence
from squawq.engine.sequence import RequestState, SequenceState
from squawq.errors import ConfigError, EngineClosed, QueueFull, RankError
from squawq.text.tokenizer import Tokenizer

MAX_MESSAGE = 500  # characters of an error message


@dataclass(frozen=True)
class _Step:
    """A step in flight: sequences and how many tokens of each, their chunks, and what the runner started."""

    planned: list[tuple[Sequence, int]]
    batch: list[Chunk]
    running: StartedStep


class Loop:
    """The engine's step, for one thread: schedule, run the model, process the results, send outputs to the sinks.

    Where the runner allows it, the next step is scheduled and started before the results of this one are processed, so
    that the device does not wait for the host. A sequence that these results end has then run one step in vain.

    `started` and `ended` are called once for each request. An error in processing one request ends only that one.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        *,
        started: Callable[[RequestState], None] = lambda _: None,
        ended: Callable[[RequestState], None] = lambda _: None,
    ) -> None:
        self.pool = PagePool(runner.num_pages, runner.page_size)
        self.scheduler = Scheduler(
            self.pool,
            config.step_tokens,
            min(config.max_num_seqs, runner.max_sequences or config.max_num_seqs),
            config.prefix_caching and runner.shares_prefixes,
            cache_outputs=runner.cache_outputs,
            release=runner.release,
        )
        self.requests: dict[str, RequestState] = {}
        self.steps = self.tokens_generated = self.prompt_tokens_computed = 0
        self.runner_seconds = self.step_seconds = 0.0
        self._runner, self._started, self._ended = runner, started, ended
        self._owners: dict[Sequence, tuple[RequestState, SequenceState]] = {}
        self._next: _Step | None = None  # started ahead

    def add(self, request: RequestState) -> None:
        self.requests[request.id] = request
        for state in request.states:
            self._owners[state.sequence] = (request, state)
            self.scheduler.add(state.sequence)

    def abort(self, request_id: str) -> None:
        if request := self.requests.get(request_id):
            self._end(request, FinishReason.ABORT)

    def end_all(self, reason: FinishReason, why: str | None = None) -> None:
        for request in list(self.requests.values()):
            self._end(request, reason, why)

    def step(self) -> None:
        """Run one step of all requests in flight and send their outputs; no-op without requests."""
        if not self.requests:
            self._next = None  # all its sequences have ended
            return
        began = time.perf_counter()
        step, self._next = self._next, None
        if step is None:
            planned = self.scheduler.plan()
            assert planned, "requests are in flight and none was scheduled"
            step = self._start(planned)
        if step is not None:
            if step.running.next_may_start and (planned := self.scheduler.plan()):
                self._next = self._start(planned)
            self._finish(step)
        self.steps += 1
        self.step_seconds += time.perf_counter() - began

    def _start(self, planned: list[tuple[Sequence, int]]) -> _Step | None:
        """Start a step; None if it fails, which ends its requests."""
        batch = [self._chunk(sequence, count) for sequence, count in planned]
        began = time.perf_counter()
        try:
            running = self._runner.start(batch)
        except RankError:  # no step can follow
            raise
        except BaseException as error:  # panics of Rust libraries too: none may end the thread
            self._fail(planned, error)
            return None
        self.runner_seconds += time.perf_counter() - began
        for (sequence, count), chunk in zip(planned, batch, strict=True):
            sequence.pending += chunk.sampling is not None
            self.scheduler.advance(sequence, count)
        return _Step(planned, batch, running)

    def _finish(self, step: _Step) -> None:
        """Wait for a step's results and process them."""
        began = time.perf_counter()
        try:
            results = step.running.outputs()
        except BaseException as error:
            for sequence, _ in step.planned:
                self.pool.forget(sequence.pages)  # some were registered when the step was started
            self._fail(step.planned, error)
            return
        self.runner_seconds += time.perf_counter() - began
        for (sequence, count), chunk, result in zip(step.planned, step.batch, results, strict=True):
            sequence.pending -= chunk.sampling is not None
            if not sequence.ended:  # in the step before, or because its request failed earlier in this loop
                self.prompt_tokens_computed += max(0, min(count, sequence.prompt - chunk.start))
                self._process_result(sequence, chunk, result)

    def _fail(self, planned: list[tuple[Sequence, int]], error: BaseException) -> None:
        for sequence, _ in planned:
            if not sequence.ended:
                self._end(self._owners[sequence][0], FinishReason.ERROR, short_message(error))

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        request, state = self._owners[sequence]
        if not request.started:
            request.started = True
            self._started(request)
        return state.chunk(count)

    def _process_result(self, sequence: Sequence, chunk: Chunk, result: StepOutput) -> None:
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
            self._end(request, FinishReason.ERROR, short_message(error))
            return
        self.tokens_generated += 1
        self._deliver(request, state, output)

    def _deliver(self, request: RequestState, state: SequenceState, output: Output) -> None:
        """Send an output to its request's sink; if the sink raises, abort the request."""
        if output.finish:
            self.scheduler.end(state.sequence)
            del self._owners[state.sequence]
        if request.ended and self.requests.pop(request.id, None) is not None:
            self._ended(request)  # before the last output is sent: its receiver may reuse the id
        try:
            request.deliver(output)
        except BaseException:
            request.sink = _discard
            self._end(request, FinishReason.ABORT)

    def _end(self, request: RequestState, reason: FinishReason, why: str | None = None) -> None:
        for state in request.states:
            if state.finish is None:
                try:
                    output = state.end(reason, why)
                except BaseException:  # the tokenizer cannot decode the text held back
                    output = Output(request.id, state.index, finish=reason, stop_reason=why)
                self._deliver(request, state, output)


class Engine(InferenceEngine):
    """Runs requests on a runner, in a thread of its own. `InferenceEngine` documents the methods.

    tokenizer: decodes outputs; None: token ids only, no stop strings or grammars. eos_ids: the model's end tokens.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        eos_ids: abc.Iterable[int] = (),
    ) -> None:
        self.config = config = config or EngineConfig()
        self.max_positions = runner.max_positions
        self.cache_tokens = runner.num_pages * runner.page_size
        self._runner, self._tokenizer, self._eos_ids = runner, tokenizer, frozenset(eos_ids)
        self._max_waiting = math.inf if config.max_waiting is None else config.max_waiting
        self._seeds = secrets.SystemRandom() if config.seed is None else random.Random(config.seed)
        self._compiler: GrammarCompiler | None = None
        self._loop = Loop(runner, config, started=self._on_start, ended=self._on_end)
        self._pid = os.getpid()
        self._changed = threading.Condition()  # guards the attributes below
        self._inbox: list[Callable[[], None]] = []  # commands for the engine's thread
        self._live: set[str] = set()  # ids of unfinished requests
        self._on_step: list[Callable[[], object]] = []
        self._queued, self._closed, self._stop = 0, False, False  # _queued: requests that have not started
        self._worker = threading.Thread(target=self._work, name="squawq-engine", daemon=True)
        self._worker.start()

    def check(self, request: Request) -> Matcher | None:
        """Return the compiled grammar. Compiling may take seconds; the result is cached while the caller holds it."""
        params = request.params
        request.check(self._runner.vocab_size, self.max_positions, self.cache_tokens)
        if self._tokenizer is None and (params.stop or params.grammar):
            raise ConfigError("stop strings and grammars need a tokenizer; the model has none")
        return None if params.grammar is None else self._grammars().compile(params.grammar, request.tenant)

    def submit(self, request: Request, sink: Sink, *, wait: bool = False) -> None:
        matcher = self.check(request)
        state = RequestState(
            request,
            sink,
            room=min(self.max_positions, self.cache_tokens),
            matcher=matcher,
            tokenizer=self._tokenizer,
            eos_ids=self._eos_ids,
            draw_seed=self.draw_seed,
        )
        for sequence in state.states:
            self._runner.prepare(sequence.sampling)
        if os.getpid() != self._pid:
            raise EngineClosed("the engine's thread did not survive a fork; load the model in the child process")
        with self._changed:
            while wait and self._queued >= self._max_waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                raise EngineClosed("the engine is closed")
            if request.id in self._live:
                raise ConfigError(f"request id {request.id!r} is in use; give each request its own")
            if self._queued >= self._max_waiting:
                raise QueueFull(f"{self._queued} requests are waiting, which is the limit; try again later")
            self._live.add(request.id)
            self._queued += 1
            self._command(lambda: self._loop.add(state))

    def on_step(self, callback: Callable[[], object]) -> None:
        self._on_step.append(callback)

    def abort(self, request_id: str) -> None:
        self._command(lambda: self._loop.abort(request_id))

    def generate(self, requests: abc.Sequence[Request]) -> Iterator[Output]:
        for request in requests:
            self.check(request)
        return outputs_of(self, requests)

    def draw_seed(self) -> int:
        return self._seeds.getrandbits(63)

    def waits(self, request_id: str) -> bool:
        with self._changed:
            state = self._loop.requests.get(request_id)
            return request_id in self._live and (state is None or not state.started)

    @property
    def alive(self) -> bool:
        return self._worker.is_alive() and not self._closed and self.failure is None

    @property
    def failure(self) -> str | None:
        return self._runner.failure

    def stats(self) -> Stats:
        loop, scheduler, pool = self._loop, self._loop.scheduler, self._loop.pool
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_used=pool.num_pages - pool.available,
            pages=pool.num_pages,
            prefix_hits=scheduler.prefix_hits,
            prefix_queries=scheduler.prefix_queries,
            preemptions=scheduler.preemptions,
            tokens_generated=loop.tokens_generated,
            prompt_tokens_computed=loop.prompt_tokens_computed,
            steps=loop.steps,
            runner_seconds=loop.runner_seconds,
            step_seconds=loop.step_seconds,
        )

    def close(self, drain: bool = False, timeout: float | None = None) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if drain and threading.current_thread() is not self._worker:
                self._changed.wait_for(lambda: not self._live, timeout)
            self._stop = True
            self._changed.notify_all()
        if threading.current_thread() is not self._worker:
            self._worker.join()

    def _grammars(self) -> GrammarCompiler:
        with self._changed:
            if self._compiler is None:
                assert self._tokenizer is not None
                vocabulary = self._tokenizer, self._runner.vocab_size, sorted(self._eos_ids)
                self._compiler = GrammarCompiler(*vocabulary, timeout_s=self.config.grammar_timeout)
            return self._compiler

    def _command(self, command: Callable[[], None]) -> None:
        with self._changed:
            self._inbox.append(command)
            self._changed.notify_all()

    def _on_start(self, _: RequestState) -> None:
        with self._changed:
            self._queued -= 1
            self._changed.notify_all()

    def _on_end(self, state: RequestState) -> None:
        with self._changed:
            self._queued -= not state.started
            self._live.discard(state.id)
            self._changed.notify_all()

    def _work(self) -> None:
        reason, why = FinishReason.ABORT, "the engine was closed"
        try:
            while self._run_commands():
                self._loop.step()
                self._call_on_step()
        except RankError as error:
            reason, why = FinishReason.ERROR, short_message(error)
        except BaseException as error:  # a bug: end all requests, so that no caller waits forever
            reason, why = FinishReason.ERROR, f"the engine failed: {error!r}"[:500]
        with self._changed:
            self._closed = self._stop = True
        self._run_commands()
        self._loop.end_all(reason, why)
        self._call_on_step()
        if self._compiler is not None:
            self._compiler.close()

    def _call_on_step(self) -> None:
        for callback in self._on_step:
            callback()

    def _run_commands(self) -> bool:
        """Wait for work, then run the commands of other threads. Returns False when the engine should stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._loop.requests or self._stop)
            commands, self._inbox = self._inbox, []
            stop = self._stop
        for command in commands:
            command()
        return not stop


def outputs_of(engine: InferenceEngine, requests: abc.Iterable[Request]) -> Iterator[Output]:
    """`InferenceEngine.generate` for requests that were checked."""
    pending = deque(requests)
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    open_sequences: dict[str, int] = {}  # unfinished ones of each request id
    try:
        while pending or open_sequences:
            while pending:
                try:
                    engine.submit(pending[0], outputs.put, wait=not open_sequences)
                except QueueFull:
                    if not open_sequences:  # other callers hold all grammars: no output of ours frees one
                        raise
                    break
                request = pending.popleft()
                open_sequences[request.id] = request.params.n
            output = outputs.get()
            if output.finish:
                open_sequences[output.request] -= 1
                if not open_sequences[output.request]:
                    del open_sequences[output.request]
            yield output
    finally:
        for request_id in open_sequences:
            engine.abort(request_id)


def _discard(_: Output) -> None:
    pass


def short_message(error: BaseException) -> str:
    """An error in one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:MAX_MESSAGE]
