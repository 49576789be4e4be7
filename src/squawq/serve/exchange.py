"""One call between the engine's thread and the event loop: its outputs as they come, until it ends, its client
disconnects or a timeout expires. Leaving the context aborts its unfinished requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

from squawq.engine.protocol import InferenceEngine
from squawq.engine.request import FinishReason, Output
from squawq.engine.sequence import join
from squawq.errors import ConfigError, EngineClosed, QueueFull
from squawq.serve.call import Call, Times
from squawq.serve.errors import ApiError

Result = TypeVar("Result")


class Disconnected(Exception):  # noqa: N818
    """The client has disconnected."""


class Mailbox:
    """Carries outputs from the engine's thread to the event loop, which is woken once per step.

    Waking it in the middle of a step would take the interpreter's lock from the engine.
    """

    def __init__(self, engine: InferenceEngine) -> None:
        self.engine = engine
        self._items: list[tuple[asyncio.Queue[Output | Exception], Output]] = []  # the engine's thread's alone
        self._loop: asyncio.AbstractEventLoop | None = None
        engine.on_step(self._send)

    def open(self) -> None:
        """Deliver to the running event loop from now on."""
        self._loop = asyncio.get_running_loop()

    def put(self, queue: asyncio.Queue[Output | Exception], output: Output) -> None:
        """Deliver an output when the step ends; call it in the engine's thread."""
        self._items.append((queue, output))

    def _send(self) -> None:
        items, self._items = self._items, []
        if items and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(_deliver, items)


def _deliver(items: list[tuple[asyncio.Queue[Output | Exception], Output]]) -> None:
    for queue, output in items:
        queue.put_nowait(output)


class Exchange:
    """A context for one call.

    Args:
        mailbox: Delivers the engine's outputs.
        arrived: When the request arrived, by time.perf_counter.
        inter_token: Called with the seconds between two tokens of a sequence.
    """

    def __init__(self, mailbox: Mailbox, arrived: float, inter_token: Callable[[float], object]) -> None:
        mailbox.open()
        self._mailbox = mailbox
        self._engine = mailbox.engine
        self._queue: asyncio.Queue[Output | Exception] = asyncio.Queue()
        self._open: dict[str, int] = {}
        self._left = False
        self.ending = asyncio.get_running_loop().create_future()  # done when `end` was called
        self._seen: dict[tuple[str, int], float] = {}
        self._inter_token = inter_token
        self.arrived = arrived
        self.checked: float | None = None  # when it was submitted to the engine
        self.first: float | None = None
        self.tokens = 0
        self.prompt_tokens = 0
        self.choices = 1
        self.max_tokens: int | None = None
        self.finish = FinishReason.ERROR

    async def __aenter__(self) -> Exchange:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._open and self.ending.done():  # the client disconnected while its answer was written
            self.finish = FinishReason.ABORT
        self._left = True
        self._abort()

    @property
    def times(self) -> Times:
        """Times of this call so far."""
        now = time.perf_counter()
        return Times(self.arrived, self.checked or now, self.first or now, now)

    def submit(self, call: Call) -> None:
        """Submit the call's requests to the engine, which checks them and compiles grammars; for a worker thread.

        Raises ApiError.
        """
        if self.left():  # the client hung up while its request was checked
            raise Disconnected
        params = call.requests[0].params
        self.prompt_tokens = sum(len(request.prompt) for request in call.requests)
        self.choices, self.max_tokens = len(call.requests) * params.n, params.max_tokens
        try:
            for request in call.requests:
                self._open[request.id] = request.params.n
                owned = replace(request, group=call.requests[0].id)
                self._engine.submit(owned, self._sink)
        except ConfigError as error:
            self._abort()
            raise call.invalid(error) from error
        except QueueFull as error:
            self._abort()
            raise ApiError("overloaded", str(error)) from error
        except EngineClosed as error:
            self._abort()
            raise ApiError("unavailable", "The server is shutting down or its engine has failed") from error
        if self.left():  # or just now
            self._abort()
        self.checked = time.perf_counter()

    def left(self) -> bool:
        """Whether the context was left."""
        return self._left

    def waits(self) -> bool:
        """Whether it is being checked, or queued in the engine."""
        return self.checked is None or (bool(self._open) and all(map(self._engine.waits, self._open)))

    def end(self, reason: Exception) -> None:
        """Raise an exception in whoever waits for this call; call it in the event loop."""
        self._queue.put_nowait(reason)
        if not self.ending.done():
            self.ending.set_result(None)

    async def checking(self, work: Awaitable[Result]) -> Result:
        """The result of `work`. If `end` comes first, its exception is raised and `work` is cancelled."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, self.ending), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            task.cancel()
            del task, work  # an exception's traceback holds this frame, and the task holds the exception
        while True:  # outputs of its first requests may stand before the reason
            self._check(self._queue.get_nowait())

    async def batches(self, pause: float) -> AsyncIterator[list[Output]]:
        """Lists of the outputs that are ready; an empty list after `pause` seconds without one.

        Raises:
            ApiError: A sequence failed, or `end` was called with this error.
            Disconnected: The client has disconnected.
        """
        while self._open:
            items = []
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause or None):
                    items.append(await self._queue.get())
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            good = [item for item in itertools.takewhile(_is_good, items) if isinstance(item, Output)]
            if good or not items:
                yield [self._check(item) for item in good]
            if len(good) < len(items):
                self._check(items.pop(len(good)))  # not held here: its traceback will hold this frame

    async def all(self, call: Call) -> list[list[Output]]:
        """Each request's sequences, joined, once all have finished."""
        parts: dict[tuple[str, int], list[Output]] = {}
        async for batch in self.batches(0):
            for output in batch:
                parts.setdefault((output.request, output.index), []).append(output)
        return [[join(parts[request.id, index]) for index in range(request.params.n)] for request in call.requests]

    def _sink(self, output: Output) -> None:
        self._mailbox.put(self._queue, output)

    def _check(self, item: Output | Exception) -> Output:
        """Record an output; raise an exception."""
        if isinstance(item, Exception):
            self.finish = FinishReason.ABORT
            try:
                raise item
            finally:
                del item  # its traceback holds this frame, and with that the request's body
        now, key = time.perf_counter(), (item.request, item.index)
        if item.ids:
            self.tokens += len(item.ids)
            if self.first is None:
                self.first = now
            if key in self._seen:
                self._inter_token((now - self._seen[key]) / len(item.ids))
            self._seen[key] = now
        if item.finish:
            self._open[item.request] -= 1
            if not self._open[item.request]:
                del self._open[item.request]
            self.finish = item.finish
            if item.finish is FinishReason.ERROR:
                self._abort()
                kind = "generation" if self._engine.alive else "unavailable"  # the request's own failure, or everyone's
                raise ApiError(kind, f"Request failed during generation: {item.stop_reason}")
        return item

    def _abort(self) -> None:
        for request in list(self._open):  # a worker thread may call this as well
            self._engine.abort(request)
        self._open.clear()


def _is_good(item: Output | Exception) -> bool:
    return isinstance(item, Output) and item.finish is not FinishReason.ERROR
