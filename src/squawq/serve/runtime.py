"""Runs requests: read, admit and parse the body (OpenAI's or TGI's API), submit to the engine, send or stream."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive

from squawq.engine.protocol import InferenceEngine
from squawq.engine.request import FinishReason, Output, Request
from squawq.engine.sequence import join
from squawq.errors import ConfigError, EngineClosed, QueueFull, SquawqError
from squawq.serve.errors import ApiError
from squawq.serve.fields import parse_json
from squawq.serve.http import EVENT_HEADERS, KEEP_ALIVE, HeldReply, blocks, drain, events, json_reply
from squawq.serve.limits import SMALL, Admission, Bodies, FairPool, Reservation, cost
from squawq.serve.logs import event
from squawq.serve.metrics import Metrics, Timing
from squawq.serve.model import Served

logger = logging.getLogger("squawq.serve")
MAX_SHOWN = 2000  # bytes of a body that are kept for the log
Result = TypeVar("Result")


@dataclass(frozen=True)
class Reply:
    """A complete reply: a JSON value and further headers."""

    body: object
    headers: Mapping[str, str] = field(default_factory=dict)


class Call(Protocol):
    """A request in OpenAI's or TGI's API: its engine requests, and methods that turn outputs into a reply or stream.

    It does no HTTP and has no threads. A payload is the data of one server-sent event: a JSON value, or a text.
    """

    stream: bool  # whether the client asked for a stream

    @property
    def requests(self) -> Sequence[Request]:
        """Engine requests, in the order of the prompts."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Further headers of a stream."""

    def invalid(self, error: ConfigError) -> ApiError:
        """The error to reply with when the engine refuses a request."""

    def push(self, output: Output) -> Sequence[object]:
        """Payloads for one output, maybe none. Outputs of a sequence come in order."""

    def end(self) -> Sequence[object]:
        """Payloads after the last output."""

    def fail(self, error: ApiError) -> Sequence[object]:
        """Payloads that end a started stream with an error."""

    def reply(self, outputs: Sequence[Sequence[Output]], timing: Timing, /) -> Reply:
        """The complete reply, from each request's joined sequences. Raises ApiError for failed sequences."""


Parse = Callable[[Mapping[str, Any], Served, str], Call]  # (JSON body, model, tenant) -> Call


class Runtime:
    """Runs requests on one model. Refuses new ones while `draining` is set."""

    def __init__(self, served: Served, metrics: Metrics) -> None:
        self.served = served
        self.settings = served.settings
        self.metrics = metrics
        self.draining = False
        self.admission = Admission(self.settings)
        self.bodies = Bodies(self.settings)
        self._exchanges: set[Exchange] = set()
        self._mailbox = Mailbox(served.engine)
        self._small = FairPool(self.settings.validation_workers, "squawq-validation")
        self._large = FairPool(  # so that small bodies never wait for large ones
            1, "squawq-validation-large", served.use_second_template_process
        )
        self._replies = FairPool(2, "squawq-replies")

    @property
    def in_flight(self) -> int:
        """Requests that are being checked, run or answered."""
        return self.admission.load.requests

    @property
    def unchecked(self) -> int:
        """Requests that are being checked, or wait to be."""
        return sum(not exchange.submitted for exchange in self._exchanges)

    def close(self) -> None:
        """Stop the worker threads; drop work that waits for one."""
        for pool in (self._small, self._large, self._replies):
            pool.close()

    def end_all(self) -> None:
        """End all requests that have no complete answer yet with an error. Call it in the event loop."""
        for exchange in self._exchanges:
            exchange.end(ApiError("unavailable", "The server is shutting down"))

    async def generate(self, request: HttpRequest, parse: Parse) -> Response:
        """Read, check and run a request. The response is a stream or the whole reply.

        Errors before the first output raise ApiError, so that the response has their HTTP status.
        """
        tenant, exchange = request.scope.get("tenant", ""), self._exchange()
        call: Call | None = None

        def observe() -> None:
            if call is not None:
                self._observe(request, exchange.timing)

        try:
            async with AsyncExitStack() as stack:
                stack.callback(observe)
                raw = [await self.bodies.read(request)]  # a list, so that `_prepare` can free the body
                shown = raw[0][:MAX_SHOWN] if self.settings.log_requests else None
                reservation = stack.enter_context(self.admitted(tenant, len(raw[0])))
                await stack.enter_async_context(self._watched(exchange, request.receive))
                call = await exchange.checking(self._prepare(parse, raw, exchange, reservation, tenant))
                if shown is not None:
                    text = shown.decode("utf-8", "replace")
                    event(logger, logging.INFO, "request", id=request.scope["request_id"], body=text)
                reply = await (self._stream if call.stream else self._whole)(call, exchange, tenant)
                reply.resources = stack.pop_all()
                return reply
        except ApiError as error:
            if not exchange.submitted:  # otherwise it is counted by how it ended
                self.metrics.rejected(error.name)
            raise

    async def compute(self, request: HttpRequest, work: Callable[[Mapping[str, Any]], Any]) -> Response:
        """A response with the JSON that `work` returns for the JSON body, without the engine."""
        tenant = request.scope.get("tenant", "")
        raw = [await self.bodies.read(request)]
        size, exchange = len(raw[0]), self._exchange()

        def encoded() -> list[bytes]:
            return blocks(work(parse_json(raw.pop())))

        async with AsyncExitStack() as stack:
            stack.enter_context(self.admitted(tenant, size))
            await stack.enter_async_context(self._watched(exchange, request.receive))
            reply = json_reply(await exchange.checking(self._in_pool(encoded, size, tenant)))
            reply.resources = stack.pop_all()
            return reply

    @contextmanager
    def admitted(self, tenant: str, size: int) -> Iterator[Reservation]:
        """Reserve room for a tenant's body of `size` bytes. Raises ApiError if there is none, or while draining."""
        if self.draining:
            raise ApiError("unavailable", "The server is shutting down")
        with self.admission.admitted(tenant, size) as reservation:
            yield reservation

    def _exchange(self) -> Exchange:
        return Exchange(self._mailbox, time.perf_counter(), self.metrics.inter_token)

    @asynccontextmanager
    async def _watched(self, exchange: Exchange, receive: Receive) -> AsyncIterator[None]:
        """End an exchange when its client disconnects, its time is up, or `end_all` is called."""
        watch = asyncio.create_task(_watch(receive, exchange))
        timers = self._timers(exchange)
        self._exchanges.add(exchange)
        try:
            async with exchange:
                yield
        finally:
            self._exchanges.discard(exchange)
            for timer in timers:
                timer.cancel()
            watch.cancel()

    def _timers(self, exchange: Exchange) -> list[asyncio.TimerHandle]:
        """Start timers that end a request: one for its time in the queue, one for its total time."""
        queued, limit = self.settings.queue_timeout, self.settings.generation_timeout

        def end_if_queued() -> None:
            if exchange.waits():
                why = f"The request waited {queued:g} s for its turn, which is the limit (--queue-timeout); try later"
                exchange.end(ApiError("overloaded", why))

        late = ApiError("incomplete", f"the answer was not ready after {limit:g} s")
        loop = asyncio.get_running_loop()
        return [loop.call_later(queued, end_if_queued), loop.call_later(limit, exchange.end, late)]

    async def _prepare(
        self, parse: Parse, raw: list[bytes], exchange: Exchange, reservation: Reservation, tenant: str
    ) -> Call:
        """Check a body and submit its requests to the engine. The body is freed as soon as it is parsed."""
        size = len(raw[0])
        call: Call = await self._in_pool(lambda: parse(parse_json(raw.pop()), self.served, tenant), size, tenant)
        self.admission.hold(reservation, size + cost(call.requests))
        await self._in_pool(lambda: exchange.submit(call), size, tenant, first=True)
        return call

    async def _in_pool(self, work: Callable[[], Any], size: int, tenant: str, *, first: bool = False) -> Any:
        """Run slow work (templates, tokenizing, grammars) in a worker thread. Raises ApiError.

        size: bytes of the body; large ones have their own thread. first: run it before the tenant's other work.
        """
        try:
            return await (self._large if size > SMALL else self._small).run(tenant, work, first=first)
        except QueueFull as error:
            raise ApiError("overloaded", str(error)) from error
        except EngineClosed as error:
            raise ApiError("unavailable", str(error)) from error
        except ConfigError as error:
            raise ApiError("invalid", str(error)) from error

    async def _whole(self, call: Call, exchange: Exchange, tenant: str) -> HeldReply:
        """The whole reply, encoded in a worker thread: a long one takes seconds."""
        outputs = await exchange.all(call)

        def make() -> tuple[list[bytes], Mapping[str, str]]:
            reply = call.reply(outputs, exchange.timing)
            return blocks(reply.body), reply.headers

        return json_reply(*await self._replies.run(tenant, make))

    async def _stream(self, call: Call, exchange: Exchange, tenant: str) -> HeldReply:
        """A stream of events. Its headers wait for the first output, so that earlier errors have their HTTP status,
        but no longer than `keep_alive_interval`: proxies close a connection that is idle for about a minute."""
        batches = exchange.batches(self.settings.keep_alive_interval)
        first = await anext(batches)
        return HeldReply(self._chunks(call, exchange, first, batches, tenant), {**EVENT_HEADERS, **call.headers})

    async def _chunks(
        self,
        call: Call,
        exchange: Exchange,
        batch: list[Output] | None,
        batches: AsyncIterator[list[Output]],
        tenant: str,
    ) -> AsyncIterator[bytes]:
        """The events of all batches, a keep-alive comment for an empty one, and the events that end the stream."""
        try:
            while batch is not None:
                async for block in drain(await self._events(call, batch, tenant) if batch else [KEEP_ALIVE]):
                    yield block
                batch = await anext(batches, None)
            last = call.end()
        except Disconnected:
            return
        except ApiError as error:
            last = call.fail(error)
        except Exception:
            logger.exception("an answer failed")
            exchange.abort()  # here: the end of the response would look like a client that left
            last = call.fail(ApiError("internal", "internal error"))
        async for block in drain(events(last)):
            yield block

    async def _events(self, call: Call, batch: list[Output], tenant: str) -> list[bytes]:
        """A batch's events. Prompt log probabilities take seconds to encode: that runs in a worker thread."""
        large = any(output.prompt_logprobs is not None for output in batch)

        def make() -> list[bytes]:
            return events((payload for output in batch for payload in call.push(output)), large=large)

        if not large:
            return make()
        found: list[bytes] = await self._replies.run(tenant, make)
        return found

    def _observe(self, request: HttpRequest, timing: Timing) -> None:
        self.metrics.observe(timing)
        first = None if timing.first_token is None else round(timing.first_token - timing.arrived, 4)
        seconds = round(timing.ended - timing.arrived, 4)
        fields: dict[str, Any] = {"prompt_tokens": timing.prompt_tokens, "tokens": timing.generated_tokens}
        fields |= {"finish": timing.finish, "first_token_s": first, "seconds": seconds}
        event(logger, logging.INFO, "generated", id=request.scope["request_id"], **fields)


async def _watch(receive: Receive, exchange: Exchange) -> None:
    """End an exchange when its client disconnects. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.end(Disconnected())


class Disconnected(Exception):  # noqa: N818
    """The client has disconnected."""


class Mailbox:
    """Carries outputs from the engine's thread to the event loop, which is woken once per step.

    Waking it in the middle of a step would take the GIL from the engine.
    """

    def __init__(self, engine: InferenceEngine) -> None:
        self.engine = engine
        self._items: list[tuple[asyncio.Queue[Output | Exception], Output]] = []  # used by the engine's thread only
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
    """Carries one Call's outputs from the engine to the event loop. Leaving the context aborts unfinished requests.

    arrived: the arrival, by time.perf_counter. inter_token: called with the seconds between two tokens of a sequence.
    """

    def __init__(self, mailbox: Mailbox, arrived: float, inter_token: Callable[[float], object]) -> None:
        mailbox.open()
        self._mailbox = mailbox
        self._engine = mailbox.engine
        self._queue: asyncio.Queue[Output | Exception] = asyncio.Queue()
        self._open: dict[str, int] = {}  # unfinished sequences of each request
        self._left = False  # the context was left
        self.ending = asyncio.get_running_loop().create_future()  # done when `end` was called
        self._seen: dict[tuple[str, int], float] = {}  # time of each sequence's latest tokens
        self._inter_token = inter_token
        self._timing = Timing(arrived)
        self.submitted = False

    async def __aenter__(self) -> Exchange:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._open and self.ending.done():  # the client disconnected while its answer was written
            self._timing.finish = FinishReason.ABORT
        self._left = True
        self.abort()

    @property
    def timing(self) -> Timing:
        """Times and counts of this call so far."""
        return replace(self._timing, ended=time.perf_counter())

    def submit(self, call: Call) -> None:
        """Submit the call's requests; the engine checks them and compiles grammars. Call it in a worker thread.

        Raises ApiError.
        """
        if self.left():  # the client disconnected while its request was checked
            raise Disconnected
        timing, params = self._timing, call.requests[0].params
        timing.prompt_tokens = sum(len(request.prompt) for request in call.requests)
        timing.n, timing.max_tokens = len(call.requests) * params.n, params.max_tokens
        try:
            for request in call.requests:
                self._open[request.id] = request.params.n
                owned = replace(request, group=call.requests[0].id)
                self._engine.submit(owned, self._sink)
        except SquawqError as error:
            self.abort(call)
            if isinstance(error, ConfigError):
                raise call.invalid(error) from error
            if isinstance(error, EngineClosed):
                raise ApiError("unavailable", "The server is shutting down or its engine has failed") from error
            raise  # QueueFull: see Runtime._in_pool
        if self.left():  # or just now; `abort` may have come between the lines above
            self.abort(call)
        timing.validated = time.perf_counter()
        self.submitted = True

    def left(self) -> bool:
        return self._left

    def waits(self) -> bool:
        """Whether the call is being checked, or all its requests are queued in the engine."""
        return not self.submitted or (bool(self._open) and all(map(self._engine.waits, self._open)))

    def end(self, reason: Exception) -> None:
        """Raise `reason` in the coroutine that waits for outputs. Call this in the event loop."""
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
        while True:  # outputs of its first requests may come before the exception
            self._check(self._queue.get_nowait())

    async def batches(self, pause: float) -> AsyncIterator[list[Output]]:
        """Lists of the outputs that are ready; an empty list after `pause` seconds without one.

        Raises ApiError if a sequence failed, and what `end` was called with.
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
                self._check(items.pop(len(good)))  # popped: its traceback will refer to this frame's `items`

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
        """Record and return an output; raise an exception, or ApiError for a failed sequence."""
        timing = self._timing
        if isinstance(item, Exception):
            timing.finish = FinishReason.ABORT
            try:
                raise item
            finally:
                del item  # its traceback holds this frame, and with that the request's body
        now, key = time.perf_counter(), (item.request, item.index)
        if item.ids:
            timing.generated_tokens += len(item.ids)
            if timing.first_token is None:
                timing.first_token = now
            if key in self._seen:
                self._inter_token((now - self._seen[key]) / len(item.ids))
            self._seen[key] = now
        if item.finish:
            left = self._open.pop(item.request, 1) - 1  # `abort` may have forgotten it
            if left:
                self._open[item.request] = left
            timing.finish = item.finish
            if item.finish is FinishReason.ERROR:
                self.abort()
                kind = "generation" if self._engine.alive else "unavailable"  # one request failed, or the engine
                raise ApiError(kind, f"Request failed during generation: {item.stop_reason}")
        return item

    def abort(self, call: Call | None = None) -> None:
        """Abort what is unfinished, or all of a call: a worker thread may submit it after the event loop aborted."""
        for request in [*self._open] if call is None else [request.id for request in call.requests]:
            self._engine.abort(request)
        self._open.clear()


def _is_good(item: Output | Exception) -> bool:
    return isinstance(item, Output) and item.finish is not FinishReason.ERROR
