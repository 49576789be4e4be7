"""A call between the engine and the event loop: what ends the wait while a request is still being checked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from squawq.engine.request import Output
from squawq.serve.errors import ApiError
from squawq.serve.exchange import Exchange, Mailbox


class Idle:
    """An engine that does nothing."""

    alive = True

    def abort(self, request: str) -> None:
        pass

    def on_step(self, callback: object) -> None:
        pass


def test_the_reason_is_raised_though_outputs_came_before() -> None:
    async def run() -> None:
        engine: Any = Idle()
        async with Exchange(Mailbox(engine), 0.0, lambda _: None) as exchange:
            never: asyncio.Task[Any] = asyncio.create_task(asyncio.sleep(60))
            exchange._queue.put_nowait(Output("a", 0, ids=(1,), text="x"))  # of the first of many prompts
            exchange.end(ApiError("unavailable", "shutting down"))
            await exchange.checking(never)

    with pytest.raises(ApiError, match="shutting down"):
        asyncio.run(run())
