"""How a request that costs work is read, checked, run and answered, and how many may be at it: whatever its route and
dialect. Speaks plain ASGI; what a body means is the parser's that comes with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from squawq.engine.request import Output
from squawq.errors import ConfigError, EngineClosed, QueueFull
from squawq.serve.bodies import SMALL, Bodies
from squawq.serve.budget import Budget, cost, scores
from squawq.serve.call import Call
from squawq.serve.errors import ApiError
from squawq.serve.exchange import Exchange, HungUp, Mailbox
from squawq.serve.fields import parse_json
from squawq.serve.logs import event
from squawq.serve.metrics import Metrics, Timing
from squawq.serve.model import Served
from squawq.serve.responses import KEEP_ALIVE, blocks, events, send_blocks, send_events, start_events, write

logger = logging.getLogger("squawq.serve")
MAX_SHOWN = 2000  # bytes of a body for the log, which shows fewer
SCORED = 4  # requests with as many log probabilities as one may have that are under way at once
Parse = Callable[[Mapping[str, Any], Served], Call]


@dataclass
class Load:
    """Requests that are under way or waiting, and the bytes that they hold, as `cost` has them."""

    requests: int = 0
    size: int = 0


@dataclass
class Place:
    """A request's place among those that are under way, and the bytes that it holds."""

    tenant: Load
    size: int = 0


class Generation:
    """Runs requests on one model. `draining` stops new ones;"""

    def __init__(self, served: Served, metrics: Metrics) -> None:
        self.served = served
        self.settings = served.settings
        self.metrics = metrics
        self.draining = False
        self.load = Load()
        self.tenants: defaultdict[str, Load] = defaultdict(Load)
        self._exchanges: set[Exchange] = set()
        self._mailbox = Mailbox(served.engine)
        self._pool = ThreadPoolExecutor(self.settings.validation_workers, "squawq-validation")
        self._large = ThreadPoolExecutor(1, "squawq-validation-large")  # so that small bodies never wait for large ones
        self._scores = Budget(SCORED * self.settings.max_logprob_entries)
        self._replies = ThreadPoolExecutor(2, "squawq-replies")
        self.bodies = Bodies(self.settings)

    @property
    def in_flight(self) -> int:
        """Requests that are checked, run or answered."""
        return self.load.requests

    @property
    def held(self) -> int:
        """Bytes that they hold."""
        return self.load.size

    @property
    def full(self) -> bool:
        """Whether there are as many requests as may be, or as much is held of them."""
        return self.in_flight >= self.settings.max_concurrent or self.held >= self.settings.max_queue_bytes

    def _refuse_beyond(self, place: Place, requests: int, size: int) -> None:
        """Raise ApiError where a request that holds `size` bytes, or one more, is too much beside the others.

        A tenant that holds less than an equal share is let in all the same, so that no other can lock it out. All
        tenants together then hold at most twice the limits.
        """
        settings, tenants, own = self.settings, max(1, len(self.settings.api_keys)), place.tenant
        for limit, wanted, others, mine in (
            (settings.max_concurrent, requests, self.load.requests, own.requests),
            (settings.max_queue_bytes, size, self.load.size - place.size, own.size - place.size),
        ):
            if wanted and others and others + wanted > limit and mine + wanted > max(1, limit // tenants):
                raise ApiError("overloaded", "Model is overloaded")

    def close(self) -> None:
        """End the threads; what waits for one is dropped."""
        for pool in (self._pool, self._large, self._replies):
            pool.shutdown(wait=False, cancel_futures=True)

    def end_all(self) -> None:
        """Answer what waits for the engine with an error; from the event loop."""
        for exchange in self._exchanges:
            exchange.end(ApiError("unavailable", "The server is shutting down"))

    async def handle(self, scope: Scope, receive: Receive, send: Send, parse: Parse) -> None:
        """Read, check, run and answer a request. Raises ApiError before the answer has begun, never after."""
        tenant = scope.get("tenant", "")
        exchange = Exchange(self._mailbox, time.perf_counter(), self.metrics.inter_token, tenant)
        try:
            raw = [await self.bodies.read(scope, receive)]
            with self.admitted(tenant, len(raw[0])) as place:
                shown = raw[0][:MAX_SHOWN] if self.settings.log_requests else None

                async def prepare(held: AsyncExitStack) -> Call:
                    call = await self._prepare(parse, raw, exchange, place, held)
                    if shown is not None:
                        text = shown.decode("utf-8", "replace")
                        event(logger, logging.INFO, "request", id=scope["request_id"], body=text)
                    return call

                await self._run(scope, receive, send, exchange, prepare)
        except ApiError as error:
            if exchange.checked is None:  # else it is counted by how it ended
                self.metrics.rejected(error.name)
            raise

    async def _run(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        exchange: Exchange,
        prepare: Callable[[AsyncExitStack], Coroutine[Any, Any, Call]],
    ) -> None:
        watch = asyncio.create_task(_watch(receive, exchange))
        alarms = self._alarms(exchange)
        call = None
        self._exchanges.add(exchange)
        try:
            async with AsyncExitStack() as held, exchange:
                call = await exchange.checking(asyncio.create_task(prepare(held)))
                if call.stream:
                    await self._stream(call, exchange, send)
                else:
                    await self._whole(call, exchange, send)
        except HungUp:
            pass
        finally:
            self._exchanges.discard(exchange)
            for alarm in alarms:
                alarm.cancel()
            watch.cancel()
            if call is not None:
                self._observe(scope, exchange)

    async def _prepare(
        self, parse: Parse, raw: list[bytes], exchange: Exchange, place: Place, held: AsyncExitStack
    ) -> Call:
        """Check a body and hand its requests to the engine, when their log probabilities have room. The body is let go
        as soon as it was parsed."""
        size = len(raw[0])

        def read() -> Call:
            if exchange.left():
                raise HungUp
            return parse(parse_json(raw.pop()), self.served)

        call: Call = await self.in_thread(read, size)
        self._hold(place, size + cost(call.requests))
        await held.enter_async_context(self._scores.take(scores(call.requests)))
        await self.in_thread(lambda: exchange.submit(call), 0)  # no more than the context by now
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

    async def _whole(self, call: Call, exchange: Exchange, send: Send) -> None:
        """Answer with one body. A long one takes seconds to make: beside the event loop."""
        outputs = await exchange.all(call)

        def make() -> tuple[list[bytes], Mapping[str, str]]:
            reply = call.reply(outputs, exchange.times)
            return blocks(reply.body), reply.headers

        body, headers = await asyncio.get_running_loop().run_in_executor(self._replies, make)
        await send_blocks(send, body, headers)

    async def _stream(self, call: Call, exchange: Exchange, send: Send) -> None:
        """Answer with events. The head waits for the first output, so that what fails before it has its own status."""
        begun = False
        try:
            async for batch in exchange.batches(self.settings.keep_alive_interval):
                if not begun:
                    begun = True
                    await start_events(send, call.headers)
                if batch:
                    await write(send, await self._events(call, batch), last=False)
                else:
                    await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            await send_events(send, call.end(), last=True)
        except ApiError as error:
            if not begun:
                raise
            await send_events(send, call.fail(error), last=True)
        except HungUp:
            raise
        except Exception:
            logger.exception("an answer failed")
            if not begun:
                raise
            await send_events(send, call.fail(ApiError("internal", "internal error")), last=True)

    async def _events(self, call: Call, batch: list[Output]) -> list[bytes]:
        """What a batch adds to a stream; a prompt's log probabilities take seconds to write: beside the event loop."""

        def make() -> list[bytes]:
            return events(payload for output in batch for payload in call.push(output))

        if all(output.prompt_logprobs is None for output in batch):
            return make()
        return await asyncio.get_running_loop().run_in_executor(self._replies, make)

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

    async def in_thread(self, work: Callable[[], Any], size: int) -> Any:
        """Run what takes time (templates, tokenizing, grammars) beside the event loop. Raises ApiError.

        size: bytes of the body; large ones have a thread of their own, so that small ones never wait for them.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._large if size > SMALL else self._pool, work)
        except QueueFull as error:
            raise ApiError("overloaded", str(error)) from error
        except EngineClosed as error:
            raise ApiError("unavailable", str(error)) from error
        except ConfigError as error:
            raise ApiError("invalid", str(error)) from error

    @contextmanager
    def admitted(self, tenant: str, size: int) -> Iterator[Place]:
        """Count a tenant's request that costs work, and the bytes of its body. Raises ApiError while there are as many
        as may be, or none are taken."""
        if self.draining:
            raise ApiError("unavailable", "The server is shutting down")
        place = Place(self.tenants[tenant])
        self._refuse_beyond(place, 1, size)
        self._count(place, 1, size)
        try:
            yield place
        finally:
            self._count(place, -1, 0)

    def _hold(self, place: Place, size: int) -> None:
        """Count what a request holds now. Raises ApiError where that is too much beside the others."""
        self._refuse_beyond(place, 0, size)
        self._count(place, 0, size)

    def _count(self, place: Place, requests: int, size: int) -> None:
        for load in (self.load, place.tenant):
            load.requests += requests
            load.size += size - place.size
        place.size = size


async def _watch(receive: Receive, exchange: Exchange) -> None:
    """Tell an exchange when its client hangs up; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.end(HungUp())
