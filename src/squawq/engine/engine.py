"""The engine: takes requests from any thread, runs them in one worker thread, sends outputs to their sinks.

Threads, the queue and the checks of requests are here; the step itself is in loop.py.
"""

from __future__ import annotations

import math
import os
import queue
import random
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from squawq.engine.config import EngineConfig
from squawq.engine.grammar import GrammarCompiler, Matcher
from squawq.engine.loop import Loop
from squawq.engine.protocol import InferenceEngine, Runner, Stats
from squawq.engine.request import FinishReason, Output, Request, Sink
from squawq.engine.sequence import RequestState, new_request_state
from squawq.errors import ConfigError, EngineClosed, QueueFull
from squawq.text.tokenizer import Tokenizer


class Engine(InferenceEngine):
    """Runs requests on a runner, in a thread of its own. InferenceEngine documents the methods.

    Args:
        runner: The model.
        tokenizer: Decodes outputs; None for token ids only, without stop strings and grammars.
        config: The knobs.
        eos_ids: Tokens that end a text.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        eos_ids: Sequence[int] = (),
    ) -> None:
        self.config = config = config or EngineConfig()
        self.max_positions = runner.max_positions
        self.cache_tokens = runner.num_pages * runner.page_size
        self._runner = runner
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(eos_ids)
        self._max_waiting = math.inf if config.max_waiting is None else config.max_waiting
        self._room = min(self.max_positions, self.cache_tokens)
        self._seeds = secrets.SystemRandom() if config.seed is None else random.Random(config.seed)
        self._compiler: GrammarCompiler | None = None
        self._loop = Loop(runner, config, started=self._on_start, ended=self._on_end)
        self._process = os.getpid()
        self._changed = threading.Condition()  # guards what follows
        self._inbox: list[Callable[[], None]] = []
        self._live: set[str] = set()
        self._on_step: list[Callable[[], object]] = []
        self._queued = 0
        self._closed = False
        self._stop = False
        self._worker = threading.Thread(target=self._work, name="squawq-engine", daemon=True)
        self._worker.start()

    def check(self, request: Request) -> Matcher | None:
        """Check a request against the model and compile its grammar, which may take seconds.

        Returns:
            The compiled grammar. It stays compiled as long as the caller holds it.

        Raises:
            ConfigError: The request can never be run.
            QueueFull: Too many different grammars are in use.
        """
        params, prompt, vocab = request.params, request.prompt, self._runner.vocab_size
        if not prompt:
            raise ConfigError("the prompt is empty; give at least one token")
        if bad := [i for i in prompt if not isinstance(i, int) or not 0 <= i < vocab]:
            raise ConfigError(f"the prompt has the token id {bad[0]!r}; the model has ids 0 to {vocab - 1}")
        if len(prompt) >= self.max_positions:
            raise ConfigError(f"the prompt has {len(prompt)} tokens; the model has {self.max_positions} positions")
        if len(prompt) >= self._room:
            raise ConfigError(f"the prompt has {len(prompt)} tokens; the cache holds {self._room} (kv_tokens)")
        named: dict[str, Iterable[int]] = {
            "stop_ids": params.stop_ids,
            "logit_bias": params.logit_bias or (),
            "allowed_ids": params.allowed_ids or (),
            "bad_ids": chain.from_iterable(params.bad_ids),
        }
        for name, ids in named.items():
            if (largest := max(ids, default=0)) >= vocab:
                raise ConfigError(f"{name} has the token id {largest}; the model has ids 0 to {vocab - 1}")
        if self._tokenizer is None and (params.stop or params.grammar):
            raise ConfigError("stop strings and grammars need a tokenizer; the model has none")
        return None if params.grammar is None else self._grammars().compile(params.grammar, request.tenant)

    def submit(self, request: Request, sink: Sink, *, wait: bool = False) -> None:
        matcher = self.check(request)
        limit = self._room
        if request.params.max_tokens is not None:
            limit = min(limit, len(request.prompt) + request.params.max_tokens)
        state = new_request_state(
            request,
            sink,
            limit=limit,
            matcher=matcher,
            tokenizer=self._tokenizer,
            eos_ids=self._eos_ids,
            draw_seed=self.draw_seed,
        )
        for sequence in state.states:
            self._runner.prepare(sequence.sampling)
        if os.getpid() != self._process:
            raise EngineClosed("the engine's thread did not survive a fork; load the model in the child process")
        with self._changed:
            while wait and self._queued >= self._max_waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                raise EngineClosed("the engine is closed")
            if request.id in self._live:
                raise ConfigError(f"request id {request.id!r} is under way; give each request its own")
            if self._queued >= self._max_waiting:
                raise QueueFull(f"{self._queued} requests are waiting, as many as may; try again later")
            self._live.add(request.id)
            self._queued += 1
            self._command(lambda: self._loop.add(state))

    def on_step(self, callback: Callable[[], object]) -> None:
        self._on_step.append(callback)

    def abort(self, request_id: str) -> None:
        self._command(lambda: self._loop.abort(request_id))

    def generate(self, requests: Sequence[Request]) -> Iterator[Output]:
        for request in requests:
            self.check(request)
        return self._generate(deque(requests))

    def draw_seed(self) -> int:
        return self._seeds.getrandbits(63)

    def waits(self, request_id: str) -> bool:
        with self._changed:
            state = self._loop.requests.get(request_id)
            return request_id in self._live and (state is None or not state.started)

    @property
    def alive(self) -> bool:
        return self._worker.is_alive() and not self._closed

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

    def _generate(self, pending: deque[Request]) -> Iterator[Output]:
        outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        open_sequences: dict[str, int] = {}
        try:
            while pending or open_sequences:
                while pending:
                    try:
                        self.submit(pending[0], outputs.put, wait=not open_sequences)
                    except QueueFull:
                        if not open_sequences:  # other callers hold the grammars: waiting would not make room
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
                self.abort(request_id)

    def _grammars(self) -> GrammarCompiler:
        with self._changed:
            if self._compiler is None:
                assert self._tokenizer is not None
                self._compiler = GrammarCompiler(
                    self._tokenizer,
                    self._runner.vocab_size,
                    sorted(self._eos_ids),
                    timeout_s=self.config.grammar_timeout,
                )
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
            while self._listen():
                self._loop.step()
                self._notify_step()
        except BaseException as error:  # a bug: no caller may be left waiting
            reason, why = FinishReason.ERROR, f"the engine failed: {error!r}"[:500]
        with self._changed:
            self._closed = True
            self._stop = True
        self._listen()
        self._loop.end_all(reason, why)
        self._notify_step()
        if self._compiler is not None:
            self._compiler.close()

    def _notify_step(self) -> None:
        for callback in self._on_step:
            callback()

    def _listen(self) -> bool:
        """Run the commands of other threads, after waiting for work; False when the engine should stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._loop.requests or self._stop)
            commands, self._inbox = self._inbox, []
            stop = self._stop
        for command in commands:
            command()
        return not stop
