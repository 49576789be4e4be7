"""How a request that costs work is read, checked, run and answered, whatever its route and dialect. Speaks plain ASGI;
what a body means is the parser's that comes with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from starlette.types import Receive, Scope, Send

from squawq.engine.request import Output
from squawq.errors import ConfigError, EngineClosed, QueueFull
from squawq.serve.call import Call
from squawq.serve.errors import ApiError
from squawq.serve.exchange import Disconnected, Exchange, Mailbox
from squawq.serve.fields import parse_json
from squawq.serve.http import KEEP_ALIVE, SMALL, Bodies, blocks, events, send_blocks, send_events, start_events, write
from squawq.serve.limits import Admission, FairPool, Reservation, cost
from squawq.serve.logs import event
from squawq.serve.metrics import Metrics, Timing
from squawq.serve.model import Served

logger = logging.getLogger("squawq.serve")
MAX_SHOWN = 2000  # bytes of a body for the log, which shows fewer
Parse = Callable[[Mapping[str, Any], Served, str], Call]  # a body and the tenant that it is from


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

    async def handle(self, scope: Scope, receive: Receive, send: Send, parse: Parse) -> None:
        """Read, check, run and answer a request. Raises ApiError before the answer has begun, never after."""
        tenant, call = scope.get("tenant", ""), None
        exchange = self._exchange()
        try:
            raw = [await self.bodies.read(scope, receive)]
            shown = raw[0][:MAX_SHOWN] if self.settings.log_requests else None
            with self.admitted(tenant, len(raw[0])) as reservation:
                async with self._watched(exchange, receive):
                    call = await exchange.checking(self._prepare(parse, raw, exchange, reservation, tenant))
                    if shown is not None:
                        text = shown.decode("utf-8", "replace")
                        event(logger, logging.INFO, "request", id=scope["request_id"], body=text)
                    await (self._stream if call.stream else self._whole)(call, exchange, send, tenant)
        except ApiError as error:
            if exchange.checked is None:  # else it is counted by how it ended
                self.metrics.rejected(error.name)
            raise
        finally:
            if call is not None:
                self._observe(scope, exchange)

    async def answer(
        self, scope: Scope, receive: Receive, send: Send, compute: Callable[[Mapping[str, Any]], Any]
    ) -> None:
        """Answer with the JSON that `compute` makes of a body, without the engine; otherwise as `handle`."""
        tenant = scope.get("tenant", "")
        raw = [await self.bodies.read(scope, receive)]
        size, exchange = len(raw[0]), self._exchange()

        def work() -> list[bytes]:
            return blocks(compute(parse_json(raw.pop())))

        with self.admitted(tenant, size):
            async with self._watched(exchange, receive):
                await send_blocks(send, await exchange.checking(self._in_lane(work, size, tenant)))

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
        except Disconnected:
            pass
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
        call: Call = await self._in_lane(lambda: parse(parse_json(raw.pop()), self.served, tenant), size, tenant)
        self.admission.hold(reservation, size + cost(call.requests))
        await self._in_lane(lambda: exchange.submit(call), 0, tenant)  # no more than the context by now
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

    async def _whole(self, call: Call, exchange: Exchange, send: Send, tenant: str) -> None:
        """Answer with one body. A long one takes seconds to make: beside the event loop."""
        outputs = await exchange.all(call)

        def make() -> tuple[list[bytes], Mapping[str, str]]:
            reply = call.reply(outputs, exchange.times)
            return blocks(reply.body), reply.headers

        body, headers = await self._replies.run(tenant, make)
        await send_blocks(send, body, headers)

    async def _stream(self, call: Call, exchange: Exchange, send: Send, tenant: str) -> None:
        """Answer with events. The head waits for the first output, so that what fails before it has its own status, but
        no longer than `keep_alive_interval`: then it goes with a comment, since a proxy ends a connection that is idle
        for a minute or so, and what fails is an event."""
        begun = False
        try:
            async for batch in exchange.batches(self.settings.keep_alive_interval):
                if not begun:
                    begun = True
                    await start_events(send, call.headers)
                if batch:
                    await write(send, await self._events(call, batch, tenant), last=False)
                else:
                    await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            await send_events(send, call.end(), last=True)
        except ApiError as error:
            if not begun:
                raise
            await send_events(send, call.fail(error), last=True)
        except Disconnected:
            raise
        except Exception:
            logger.exception("an answer failed")
            if not begun:
                raise
            await send_events(send, call.fail(ApiError("internal", "internal error")), last=True)

    async def _events(self, call: Call, batch: list[Output], tenant: str) -> list[bytes]:
        """What a batch adds to a stream; a prompt's log probabilities take seconds to write: beside the event loop."""

        def make() -> list[bytes]:
            return events(payload for output in batch for payload in call.push(output))

        if all(output.prompt_logprobs is None for output in batch):
            return make()
        found: list[bytes] = await self._replies.run(tenant, make)
        return found

    def _observe(self, scope: Scope, exchange: Exchange) -> None:
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
            id=scope["request_id"],
            prompt_tokens=timing.prompt_tokens,
            tokens=timing.generated_tokens,
            finish=timing.finish,
            first_token_s=first,
            seconds=round(timing.ended - timing.arrived, 4),
        )

    async def _in_lane(self, work: Callable[[], Any], size: int, tenant: str) -> Any:
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
