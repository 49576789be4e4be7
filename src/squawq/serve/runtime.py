"""Runs requests: read the body, admit, parse in the dialect, submit to the engine, stream or send the reply."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from squawq.engine.request import Output
from squawq.errors import ConfigError, EngineClosed, QueueFull
from squawq.serve.call import Call
from squawq.serve.errors import ApiError
from squawq.serve.exchange import Disconnected, Exchange, Mailbox
from squawq.serve.fields import parse_json
from squawq.serve.http import EVENT_HEADERS, KEEP_ALIVE, SMALL, Bodies, HeldReply, blocks, drain, events, json_reply
from squawq.serve.limits import Admission, FairPool, Reservation, cost
from squawq.serve.logs import event
from squawq.serve.metrics import Metrics, Timing
from squawq.serve.model import Served

logger = logging.getLogger("squawq.serve")
MAX_SHOWN = 2000  # bytes of a body that are kept for the log
Parse = Callable[[Mapping[str, Any], Served, str], Call]  # from body and tenant


class Runtime:
    """Runs requests on one model. `draining` stops new ones."""

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
        self._large = FairPool(
            1, "squawq-validation-large", served.use_second_template_process
        )  # so that small ones never wait for it
        self._replies = FairPool(2, "squawq-replies")

    @property
    def in_flight(self) -> int:
        """Requests that are checked, run or answered."""
        return self.admission.load.requests

    @property
    def unchecked(self) -> int:
        """Requests that are being checked, or wait for that."""
        return sum(exchange.checked is None for exchange in self._exchanges)

    def close(self) -> None:
        """End the threads; what waits for one is dropped."""
        for lane in (self._small, self._large, self._replies):
            lane.close()

    def end_all(self) -> None:
        """Answer what is being checked or waits for the engine with an error; from the event loop."""
        for exchange in self._exchanges:
            exchange.end(ApiError("unavailable", "The server is shutting down"))

    async def generate(self, request: Request, parse: Parse) -> Response:
        """Read, check and run a request. The response streams, or has the whole reply.

        What fails before the first output raises ApiError, and so has a status of its own.
        """
        tenant, exchange = request.scope.get("tenant", ""), self._exchange()
        call: Call | None = None

        def observe() -> None:
            if call is not None:
                self._observe(request, exchange)

        try:
            async with AsyncExitStack() as stack:
                stack.callback(observe)
                raw = [await self.bodies.read(request)]
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
            if exchange.checked is None:  # otherwise it is counted by how it ended
                self.metrics.rejected(error.name)
            raise

    async def compute(self, request: Request, work: Callable[[Mapping[str, Any]], Any]) -> Response:
        """A response with the JSON that `work` makes of the body, without the engine."""
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

    def _exchange(self) -> Exchange:
        return Exchange(self._mailbox, time.perf_counter(), self.metrics.inter_token)

    @asynccontextmanager
    async def _watched(self, exchange: Exchange, receive: Receive) -> AsyncIterator[None]:
        """End an exchange when its client hangs up, when its time is over, and with `end_all`."""
        watch = asyncio.create_task(_watch(receive, exchange))
        alarms = self._alarms(exchange)
        self._exchanges.add(exchange)
        try:
            async with exchange:
                yield
        finally:
            self._exchanges.discard(exchange)
            for alarm in alarms:
                alarm.cancel()
            watch.cancel()

    async def _prepare(
        self, parse: Parse, raw: list[bytes], exchange: Exchange, reservation: Reservation, tenant: str
    ) -> Call:
        """Check a body and hand its requests to the engine. The body is let go as soon as it was parsed."""
        size = len(raw[0])
        call: Call = await self._in_pool(lambda: parse(parse_json(raw.pop()), self.served, tenant), size, tenant)
        self.admission.hold(reservation, size + cost(call.requests))
        await self._in_pool(lambda: exchange.submit(call), size, tenant)
        return call

    def _alarms(self, exchange: Exchange) -> list[asyncio.TimerHandle]:
        """End a request that waits too long for its turn, or that takes too long altogether."""
        queued, limit = self.settings.queue_timeout, self.settings.generation_timeout

        def turn() -> None:
            if exchange.waits():
                message = (
                    f"The request waited {queued:g} s for its turn, as long as it may (--queue-timeout); try later"
                )
                exchange.end(ApiError("overloaded", message))

        late = ApiError("incomplete", f"the answer was not ready after {limit:g} s")
        loop = asyncio.get_running_loop()
        return [loop.call_later(queued, turn), loop.call_later(limit, exchange.end, late)]

    async def _whole(self, call: Call, exchange: Exchange, tenant: str) -> HeldReply:
        """The whole reply. Encoding a long one takes seconds: in a worker thread."""
        outputs = await exchange.all(call)

        def make() -> tuple[list[bytes], Mapping[str, str]]:
            reply = call.reply(outputs, exchange.times)
            return blocks(reply.body), reply.headers

        return json_reply(*await self._replies.run(tenant, make))

    async def _stream(self, call: Call, exchange: Exchange, tenant: str) -> HeldReply:
        """A stream of events. Its head waits for the first output, so that what fails before has a status of its own,
        but no longer than `keep_alive_interval`: proxies close a connection that is idle for about a minute."""
        batches = exchange.batches(self.settings.keep_alive_interval)
        first = await anext(batches)
        return HeldReply(self._chunks(call, first, batches, tenant), {**EVENT_HEADERS, **call.headers})

    async def _chunks(
        self, call: Call, batch: list[Output] | None, batches: AsyncIterator[list[Output]], tenant: str
    ) -> AsyncIterator[bytes]:
        """The events of all batches, a comment for an empty one, and what ends the stream."""
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
            last = call.fail(ApiError("internal", "internal error"))
        async for block in drain(events(last)):
            yield block

    async def _events(self, call: Call, batch: list[Output], tenant: str) -> list[bytes]:
        """What a batch adds to a stream; a prompt's log probabilities take seconds to write: beside the event loop."""

        def make() -> list[bytes]:
            return events(payload for output in batch for payload in call.push(output))

        if all(output.prompt_logprobs is None for output in batch):
            return make()
        found: list[bytes] = await self._replies.run(tenant, make)
        return found

    def _observe(self, request: Request, exchange: Exchange) -> None:
        times = exchange.times
        timing = Timing(
            arrived=exchange.arrived,
            validated=times.checked,
            ended=times.ended,
            prompt_tokens=exchange.prompt_tokens,
            generated_tokens=exchange.tokens,
            finish=exchange.finish,
            first_token=exchange.first,
            n=exchange.choices,
            max_tokens=exchange.max_tokens,
        )
        self.metrics.observe(timing)
        first = None if timing.first_token is None else round(timing.first_token - timing.arrived, 4)
        event(
            logger,
            logging.INFO,
            "generated",
            id=request.scope["request_id"],
            prompt_tokens=timing.prompt_tokens,
            tokens=timing.generated_tokens,
            finish=timing.finish,
            first_token_s=first,
            seconds=round(timing.ended - timing.arrived, 4),
        )

    async def _in_pool(self, work: Callable[[], Any], size: int, tenant: str) -> Any:
        """Run what takes time (templates, tokenizing, grammars) beside the event loop. Raises ApiError.

        size: bytes of the body; large ones have a thread of their own, so that small ones never wait for them.
        """
        try:
            return await (self._large if size > SMALL else self._small).run(tenant, work)
        except QueueFull as error:
            raise ApiError("overloaded", str(error)) from error
        except EngineClosed as error:
            raise ApiError("unavailable", str(error)) from error
        except ConfigError as error:
            raise ApiError("invalid", str(error)) from error

    @contextmanager
    def admitted(self, tenant: str, size: int) -> Iterator[Reservation]:
        """A reservation for a tenant's request. Raises ApiError while there is none, or none are taken."""
        if self.draining:
            raise ApiError("unavailable", "The server is shutting down")
        with self.admission.admitted(tenant, size) as reservation:
            yield reservation


async def _watch(receive: Receive, exchange: Exchange) -> None:
    """Tell an exchange when its client hangs up; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.end(Disconnected())
