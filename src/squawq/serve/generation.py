"""How a request that costs work is read, checked, run and answered, and how many may be at it: whatever its route and
dialect. Speaks plain ASGI; what a body means is the parser's that comes with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from starlette.types import Receive, Scope, Send

from squawq.engine.request import Output
from squawq.errors import ConfigError, EngineClosed, QueueFull
from squawq.serve.bodies import Bodies
from squawq.serve.call import Call, dump
from squawq.serve.errors import ApiError
from squawq.serve.exchange import Exchange, HungUp, Mailbox
from squawq.serve.fields import parse_json
from squawq.serve.logs import event
from squawq.serve.metrics import Metrics, Timing
from squawq.serve.model import Served
from squawq.serve.responses import KEEP_ALIVE, send_bytes, send_events, start_events

logger = logging.getLogger("squawq.serve")
Parse = Callable[[Mapping[str, Any], Served], Call]


class Generation:
    """Runs requests on one model. `draining` stops new ones; `in_flight` counts what is checked, run or answered."""

    def __init__(self, served: Served, metrics: Metrics) -> None:
        self.served = served
        self.settings = served.settings
        self.metrics = metrics
        self.draining = False
        self.in_flight = 0
        self._exchanges: set[Exchange] = set()
        self._mailbox = Mailbox(served.engine)
        self._pool = ThreadPoolExecutor(self.settings.validation_workers, "squawq-validation")
        self._replies = ThreadPoolExecutor(2, "squawq-replies")
        self.bodies = Bodies(self.settings)

    @property
    def full(self) -> bool:
        """Whether there are as many requests as may be, or as many prompts waiting."""
        return self.in_flight >= self.settings.max_concurrent or self.served.engine.full

    def close(self) -> None:
        """End the threads; what waits for one is dropped."""
        for pool in (self._pool, self._replies):
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
            raw = await self.bodies.read(scope, receive)
            with self.admitted():
                await self._run(scope, receive, send, parse, raw, exchange)
        except ApiError as error:
            if exchange.checked is None:  # else it is counted by how it ended
                self.metrics.rejected(error.name)
            raise

    async def _run(
        self, scope: Scope, receive: Receive, send: Send, parse: Parse, raw: bytes, exchange: Exchange
    ) -> None:
        def prepare() -> Call:
            if exchange.left():
                raise HungUp
            call = parse(parse_json(raw), self.served)
            exchange.submit(call)
            return call

        watch = asyncio.create_task(_watch(receive, exchange))
        limit = self.settings.generation_timeout
        late = ApiError("incomplete", f"the answer was not ready after {limit:g} s")
        alarm = asyncio.get_running_loop().call_later(limit, exchange.end, late)
        call = None
        self._exchanges.add(exchange)
        try:
            async with exchange:
                call = await exchange.checking(asyncio.create_task(self.in_thread(prepare)))
                if self.settings.log_requests:
                    event(logger, logging.INFO, "request", id=scope["request_id"], body=raw.decode("utf-8", "replace"))
                if call.stream:
                    await self._stream(call, exchange, send)
                else:
                    await self._whole(call, exchange, send)
        except HungUp:
            pass
        finally:
            self._exchanges.discard(exchange)
            alarm.cancel()
            watch.cancel()
            if call is not None:
                self._observe(scope, exchange)

    async def _whole(self, call: Call, exchange: Exchange, send: Send) -> None:
        """Answer with one body. A long one takes seconds to make: beside the event loop."""
        outputs = await exchange.all(call)

        def make() -> tuple[bytes, Mapping[str, str]]:
            reply = call.reply(outputs, exchange.times)
            return dump(reply.body).encode("utf-8", "replace"), reply.headers

        body, headers = await asyncio.get_running_loop().run_in_executor(self._replies, make)
        await send_bytes(send, 200, body, "application/json", headers)

    async def _stream(self, call: Call, exchange: Exchange, send: Send) -> None:
        """Answer with events. The head waits for the first output, so that what fails before it has its own status."""
        begun = False
        try:
            async for batch in exchange.batches(self.settings.keep_alive_interval):
                if not begun:
                    begun = True
                    await start_events(send, call.headers)
                if batch:
                    await send_events(send, await self._payloads(call, batch))
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

    async def _payloads(self, call: Call, batch: list[Output]) -> list[str]:
        """What a batch adds to a stream; a prompt's log probabilities take seconds to write: beside the event loop."""

        def make() -> list[str]:
            return [payload for output in batch for payload in call.push(output)]

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

    async def in_thread(self, work: Callable[[], Any]) -> Any:
        """Run what takes time (templates, tokenizing, grammars) beside the event loop. Raises ApiError."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except QueueFull as error:
            raise ApiError("overloaded", str(error)) from error
        except EngineClosed as error:
            raise ApiError("unavailable", str(error)) from error
        except ConfigError as error:
            raise ApiError("invalid", str(error)) from error

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request that costs work. Raises ApiError while there are as many as may be, or none are taken."""
        if self.draining:
            raise ApiError("unavailable", "The server is shutting down")
        if self.full:
            raise ApiError("overloaded", "Model is overloaded")
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1


async def _watch(receive: Receive, exchange: Exchange) -> None:
    """Tell an exchange when its client hangs up; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.end(HungUp())
