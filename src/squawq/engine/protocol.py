"""The interfaces around the engine: `InferenceEngine`, which LLM and serve use, and `Runner`, which runs a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from squawq.backends.sampling import Chunk, Sampling, StartedStep
from squawq.engine.request import Output, Request, Sink


@dataclass(frozen=True)
class Stats:
    """Counters since the engine's start, and its state now."""

    running: int  # sequences
    waiting: int
    pages_used: int  # of the KV cache
    pages: int
    prefix_hits: int  # prompt tokens found in the prefix cache
    prefix_queries: int  # prompt tokens looked up in it
    preemptions: int
    tokens_generated: int
    prompt_tokens_computed: int
    steps: int
    runner_seconds: float  # wall time; the runner's part of step_seconds
    step_seconds: float


class InferenceEngine(Protocol):
    """What LLM and serve need of an engine: ours (engine.py), a fake in tests, or an adapter to another engine.

    All methods may be called from any thread.
    """

    max_positions: int  # context length of the model
    cache_tokens: int  # capacity of the KV cache

    @property
    def alive(self) -> bool:
        """Whether it takes requests; False after `close` and after a failure."""

    @property
    def failure(self) -> str | None:
        """Why the model cannot run any more, `Runner.failure`; None while it can."""

    def check(self, request: Request) -> object:
        """Raise ConfigError for a request that can never be run, QueueFull while too many grammars are in use.

        The caller may hold on to the result, to keep a compiled grammar until `submit`.
        """

    def submit(self, request: Request, sink: Sink, *, wait: bool = False) -> None:
        """Queue a request; `sink` receives its outputs in order, from the engine's thread. A sink that raises aborts.

        Args:
            wait: Wait for room in the queue; not from a sink, which would wait for itself.

        Raises:
            ConfigError: The request can never be run, or its id is in use.
            QueueFull: There is no room in the queue.
            EngineClosed: After `close`.
        """

    def generate(self, requests: Sequence[Request]) -> Iterator[Output]:
        """Run requests and yield their outputs as they come, those of one sequence in order.

        All requests are checked first, and submitted as the queue has room. Closing the iterator aborts the rest.
        """

    def abort(self, request_id: str) -> None:
        """End a request with the reason "abort"; no-op for an unknown one."""

    def waits(self, request_id: str) -> bool:
        """Whether a request is queued and has not started."""

    def on_step(self, callback: Callable[[], object]) -> None:
        """Call `callback`, which must not raise, in the engine's thread after each step's outputs are sent."""

    def draw_seed(self) -> int:
        """A seed for a request without one."""

    def stats(self) -> Stats:
        """Counters and state."""

    def close(self, drain: bool = False, timeout: float | None = None) -> None:
        """Take no more requests and stop; `drain` waits for running ones, for `timeout` seconds at most. Idempotent."""


class Runner(Protocol):
    """A model with a paged KV cache. A sequence's outputs depend on that sequence only, never on the batch.

    Of transformers' models (transformers_runner.py) that holds up to rounding.
    """

    vocab_size: int
    max_positions: int
    page_size: int
    num_pages: int
    # Whether generated tokens have the same keys and values, to the bit, when they run as a prompt's; if not, the
    # engine does not cache them for prompts, and after a preemption runs them one by one as before.
    cache_outputs: bool
    # Whether pages hold all that a sequence needs of its past. If not, the rest is kept by `Chunk.slot` and begins anew
    # with a chunk at position 0; the engine then has no prefix cache.
    shares_prefixes: bool

    @property
    def max_sequences(self) -> int | None:
        """Sequences that it has room for beside what pages hold; None: no limit of its own."""

    @property
    def failure(self) -> str | None:
        """Why it can run no more steps; None while it can."""

    def prepare(self, sampling: Sampling) -> None:
        """Set `sampling.state`, where that takes time; called in the thread that submits the request."""

    def start(self, batch: Sequence[Chunk]) -> StartedStep:
        """Start a step. Steps run in the order in which they are started."""

    def release(self, slot: int) -> None:
        """Free what it keeps by `Chunk.slot` of a sequence that has ended or was preempted, if that is memory of its
        own; the slot's next chunk starts at position 0."""

    def close(self) -> None:
        """Free what it holds beside memory. Idempotent."""
