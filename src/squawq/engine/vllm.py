"""vLLM's engine behind LLM and serve: an `InferenceEngine` that runs requests on vLLM's AsyncLLM (tested with 0.32).

vLLM schedules, runs and samples; text, stop strings, finish reasons and best_of are those of our engine. For models and
machines that our decoder does not run, and for several hosts.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import secrets
import signal
import sys
import threading
from collections import abc
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from squawq.config import ModelConfig
from squawq.engine.config import EngineConfig
from squawq.engine.engine import outputs_of, short_message
from squawq.engine.grammar import GrammarCompiler
from squawq.engine.protocol import InferenceEngine, Stats
from squawq.engine.request import FinishReason, Output, Request, Sink
from squawq.engine.sequence import RequestState, SequenceState
from squawq.engine.vllm_params import token_logprob, vllm_params
from squawq.engine.vllm_process import OWNER
from squawq.errors import ConfigError, EngineClosed, QueueFull
from squawq.text.tokenizer import Tokenizer

# Settings of EngineConfig that vLLM has by the same names
SHARED = (
    "dtype",
    "kv_cache_dtype",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "distributed_executor_backend",
    "nnodes",
    "node_rank",
    "master_addr",
    "master_port",
    "gpu_memory_utilization",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
)
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CONFIGURE_LOGGING": "1"}
# Without spaces in JSON: small models, left free, write empty lines for ever
STRUCTURED = {"backend": "guidance", "disable_any_whitespace": True}


def arguments(folder: Path, config: EngineConfig) -> dict[str, Any]:
    """The arguments of vLLM's AsyncEngineArgs. Raises ConfigError for one that vLLM does not have."""
    try:
        from vllm import AsyncEngineArgs
    except ImportError as error:
        raise ConfigError(
            f"engine is 'vllm', but vLLM cannot be imported ({error}); install it, or leave engine out"
        ) from error
    if config.device.startswith("cuda:"):
        raise ConfigError(
            f"device is {config.device!r}, but vLLM takes the first GPUs that it sees; choose cuda, and set "
            "CUDA_VISIBLE_DEVICES for others"
        )
    found = {name: getattr(config, name) for name in SHARED if getattr(config, name) is not None}
    found |= {"model": str(folder), "enable_prefix_caching": config.prefix_caching, **config.engine_args}
    found["structured_outputs_config"] = {**STRUCTURED, **found.get("structured_outputs_config", {})}
    known = {field.name for field in fields(AsyncEngineArgs)}
    if unknown := [name for name in found if name not in known]:
        raise ConfigError(f"engine_args has {unknown[0]!r}, which this vLLM's AsyncEngineArgs does not")
    return found


def run_node(folder: Path, config: EngineConfig) -> None:
    """Run the part of a model that a host other than host 0 has, until host 0 ends or a signal comes."""
    _prepare_environment()
    given = arguments(folder, config)
    from vllm import AsyncEngineArgs
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    executor = None
    try:
        settings = AsyncEngineArgs(**given).create_engine_config(headless=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        executor = MultiprocExecutor(settings, monitor_workers=False)
        executor.start_worker_monitor(inline=True)
    except Exception as error:
        raise ConfigError(f"vLLM cannot run its part of {folder}: {short_message(error)}") from error
    finally:
        if executor is not None:
            executor.shutdown()


def _prepare_environment() -> None:
    """What vLLM's processes are to inherit."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ[OWNER] = str(os.getpid())


@dataclass
class _Counters:
    """What vLLM's scheduler says of each of its steps."""

    running: int = 0
    waiting: int = 0
    usage: float = 0.0  # of the KV cache
    prefix_hits: int = 0
    prefix_queries: int = 0
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0

    def record(self, scheduler: Any, iteration: Any, *_: object, **__: object) -> None:
        if scheduler is not None:
            self.running, self.waiting = scheduler.num_running_reqs, scheduler.num_waiting_reqs
            self.usage = scheduler.kv_cache_usage
            self.prefix_hits += scheduler.prefix_cache_stats.hits
            self.prefix_queries += scheduler.prefix_cache_stats.queries
            self.steps += 1
        if iteration is not None:
            self.preemptions += iteration.num_preempted_reqs
            self.prompt_tokens += iteration.prompt_token_stats.total


class VllmEngine(InferenceEngine):
    """Runs requests on vLLM, whose processes end with `close`. `InferenceEngine` documents the methods.

    Args:
        folder: The model.
        model: Its config.
        tokenizer: Decodes outputs; None: token ids only, no stop strings or grammars.
        eos_ids: The model's end tokens.

    Raises:
        ConfigError: There is no vLLM, or it refuses the model or an argument.
    """

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        model: ModelConfig,
        tokenizer: Tokenizer | None = None,
        *,
        eos_ids: abc.Iterable[int] = (),
    ) -> None:
        _prepare_environment()
        given = arguments(folder, config)
        self.config, self._vocab, self._tokenizer = config, model.vocab_size, tokenizer
        self._eos_ids = frozenset(eos_ids)
        self._max_waiting = math.inf if config.max_waiting is None else config.max_waiting
        self._seed = None if config.seed is None else random.Random(config.seed)
        self._compiler: GrammarCompiler | None = None
        self._changed = threading.Condition()  # guards the attributes below
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._states: dict[str, RequestState] = {}
        self._closed = False
        self._on_step: list[Callable[[], object]] = []
        self._called = False  # whether the callbacks are to be called soon
        self._counters, self._generated = _Counters(), 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="squawq-vllm", daemon=True)
        self._thread.start()
        try:
            self._llm = self._run(self._start(given))
        except BaseException as error:
            self._stop_loop()
            if isinstance(error, Exception):
                raise ConfigError(f"vLLM cannot run {folder}: {short_message(error)}") from error
            raise
        settings = self._llm.vllm_config
        self.max_positions = settings.model_config.max_model_len
        cache = settings.cache_config
        self._pages = cache.num_gpu_blocks or 0
        self.cache_tokens = self._pages * cache.block_size

    async def _start(self, given: dict[str, Any]) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.loggers import StatLoggerBase

        counters = self._counters

        class Logger(StatLoggerBase):  # type: ignore[misc, unused-ignore]
            def __init__(self, *_: object, **__: object) -> None: ...

            def record(self, *args: Any, **others: Any) -> None:
                counters.record(*args, **others)

            def log_engine_initialized(self) -> None: ...

        args = AsyncEngineArgs(**given)
        return AsyncLLM.from_engine_args(args, stat_loggers=[Logger])

    def check(self, request: Request) -> object:
        params = request.params
        request.check(self._vocab, self.max_positions, self.cache_tokens)
        if params.typical_p != 1:
            raise ConfigError(f"typical_p is {params.typical_p}, which vLLM does not have; leave it out")
        if self._tokenizer is None and (params.stop or params.grammar):
            raise ConfigError("stop strings and grammars need a tokenizer; the model has none")
        return None if params.grammar is None else self._grammars().compile(params.grammar, request.tenant)

    def submit(self, request: Request, sink: Sink, *, wait: bool = False) -> None:
        self.check(request)
        state = RequestState(
            request,
            sink,
            room=min(self.max_positions, self.cache_tokens),
            matcher=None,  # vLLM keeps to the grammar
            tokenizer=self._tokenizer,
            eos_ids=self._eos_ids,
            draw_seed=self.draw_seed,
        )
        with self._changed:
            while wait and self._waiting() >= self._max_waiting and not self._closed:
                self._changed.wait()
            if self._closed or self.failure is not None:
                raise EngineClosed("the engine is closed")
            if request.id in self._states:
                raise ConfigError(f"request id {request.id!r} is in use; give each request its own")
            if (waiting := self._waiting()) >= self._max_waiting:
                raise QueueFull(f"{waiting} requests are waiting, which is the limit; try again later")
            self._states[request.id] = state
        self._loop.call_soon_threadsafe(self._begin, state)

    def generate(self, requests: abc.Sequence[Request]) -> Iterator[Output]:
        for request in requests:
            self.check(request)
        return outputs_of(self, requests)

    def abort(self, request_id: str) -> None:
        def cancel() -> None:
            if (task := self._tasks.get(request_id)) is not None:
                task.cancel()

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(cancel)

    def waits(self, request_id: str) -> bool:
        state = self._states.get(request_id)
        return state is not None and not state.started

    def on_step(self, callback: Callable[[], object]) -> None:
        self._on_step.append(callback)

    def draw_seed(self) -> int:
        return secrets.randbits(63) if self._seed is None else self._seed.getrandbits(63)

    @property
    def alive(self) -> bool:
        return not self._closed and self.failure is None

    @property
    def failure(self) -> str | None:
        return "vLLM's engine has ended" if not self._closed and self._llm.errored else None

    def stats(self) -> Stats:
        counters = self._counters
        return Stats(
            running=counters.running,
            waiting=counters.waiting,
            pages_used=round(counters.usage * self._pages),
            pages=self._pages,
            prefix_hits=counters.prefix_hits,
            prefix_queries=counters.prefix_queries,
            preemptions=counters.preemptions,
            tokens_generated=self._generated,
            prompt_tokens_computed=counters.prompt_tokens,
            steps=counters.steps,
            runner_seconds=0.0,  # vLLM does not say
            step_seconds=0.0,
        )

    def close(self, drain: bool = False, timeout: float | None = None) -> None:
        own = threading.current_thread() is self._thread
        with self._changed:
            first, self._closed = not self._closed, True
            self._changed.notify_all()
            if drain and not own:
                self._changed.wait_for(lambda: not self._states, timeout)
        if not first:
            return
        if own:  # from a sink: this thread cannot wait for itself
            threading.Thread(target=self._end, daemon=True).start()
        else:
            self._end()

    def _end(self) -> None:
        async def cancel() -> None:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._call_on_step()
            self._llm.shutdown()

        self._run(cancel())
        del self._llm  # while its modules are there, which its destructor needs
        self._stop_loop()
        if self._compiler is not None:
            self._compiler.close()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: abc.Coroutine[Any, Any, Any]) -> Any:
        pending: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return pending.result()

    def _waiting(self) -> int:
        return sum(not state.started for state in self._states.values())

    def _grammars(self) -> GrammarCompiler:
        with self._changed:
            if self._compiler is None:
                assert self._tokenizer is not None
                vocabulary = self._tokenizer, self._vocab, sorted(self._eos_ids)
                self._compiler = GrammarCompiler(*vocabulary, timeout_s=self.config.grammar_timeout)
            return self._compiler

    # From here on, all runs in the loop's thread.
    def _begin(self, request: RequestState) -> None:
        task = self._loop.create_task(self._serve(request))
        self._tasks[request.id] = task
        task.add_done_callback(lambda task: self._finish(request, task))  # also of one cancelled before its start

    async def _serve(self, request: RequestState) -> None:
        async with asyncio.TaskGroup() as group:
            for state in request.states:
                group.create_task(self._follow(request, state))

    def _finish(self, request: RequestState, task: asyncio.Task[None]) -> None:
        """End what has not ended, whatever happened to the task."""
        reason, why = FinishReason.ABORT, "the engine was closed" if self._closed else None
        error = None if task.cancelled() else task.exception()
        if isinstance(error, BaseExceptionGroup) and not error.subgroup(_SinkError):
            reason, why = FinishReason.ERROR, self.failure or short_message(error.exceptions[0])
        for state in request.states:
            if state.finish is None:
                try:
                    output = state.end(reason, why)
                except Exception:  # the tokenizer cannot decode the text held back
                    output = Output(request.id, state.index, finish=reason, stop_reason=why)
                with suppress(_SinkError):
                    self._deliver(request, output, last=request.ended)
        self._forget(request)

    async def _follow(self, request: RequestState, state: SequenceState) -> None:
        from vllm.inputs.engine import tokens_input

        params, prompt = vllm_params(request.request.params, state, self._seed is not None), request.request.prompt
        salt = "\0".join(filter(None, (request.request.tenant, request.request.cache_salt)))
        given = tokens_input(list(prompt), cache_salt=salt or None)
        stream: AsyncGenerator[Any] = self._llm.generate(given, params, f"{request.id}-{state.index}")
        async with aclosing(stream):
            await self._read(request, state, stream)

    async def _read(self, request: RequestState, state: SequenceState, stream: AsyncGenerator[Any]) -> None:
        """Take vLLM's outputs until the sequence has ended, for vLLM or for us."""
        prompt = request.request.prompt
        async for found in stream:
            if not request.started:
                with self._changed:
                    request.started = True
                    self._changed.notify_all()
            if found.prompt_logprobs is not None and state.sequence.score:
                top = request.request.params.prompt_logprobs or 0
                scored = zip(prompt, found.prompt_logprobs, strict=False)
                state.score(0, [token_logprob(token, scores, top) for token, scores in scored if scores])
            completion = found.outputs[0]
            for at, token in enumerate(completion.token_ids):
                scores = None if completion.logprobs is None else completion.logprobs[at]
                top = state.sampling.logprobs or 0
                output = state.step(token, None if scores is None else token_logprob(token, scores, top))
                self._generated += 1
                self._deliver(request, output, last=request.ended)
                if state.finish is not None:
                    return
            if found.finished and state.finish is None:
                output = state.end(FinishReason.LENGTH)
                self._deliver(request, output, last=request.ended)

    def _deliver(self, request: RequestState, output: Output, *, last: bool) -> None:
        if last:
            self._forget(request)  # before the last output is sent: its receiver may reuse the id
        try:
            request.deliver(output)
        except BaseException as error:
            request.sink = lambda _: None
            raise _SinkError from error
        finally:
            if self._on_step and not self._called:
                self._called = True
                self._loop.call_soon(self._call_on_step)

    def _forget(self, request: RequestState) -> None:
        with self._changed:
            if self._states.get(request.id) is request:
                del self._states[request.id], self._tasks[request.id]
                self._changed.notify_all()

    def _call_on_step(self) -> None:
        self._called = False
        for callback in self._on_step:
            callback()


class _SinkError(Exception):
    """A request's sink raised: it is aborted."""
