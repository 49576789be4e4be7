"""A call between the engine and the event loop: what ends the wait while a request is still being checked."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from running import Running

from squawq.engine.request import FinishReason, Output, Request, SamplingParams
from squawq.errors import ConfigError
from squawq.serve.errors import ApiError
from squawq.serve.runtime import Exchange, Mailbox


class Idle:
    """An engine that does nothing."""

    alive, failure = True, None

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


def test_who_is_cancelled_leaves_no_check_behind() -> None:
    async def run() -> None:
        engine: Any = Idle()
        async with Exchange(Mailbox(engine), 0.0, lambda _: None) as exchange:
            never: asyncio.Task[Any] = asyncio.create_task(asyncio.sleep(60))
            waiting = asyncio.create_task(exchange.checking(never))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait((waiting, never), timeout=20)
            assert waiting.cancelled()
            assert never.cancelled()

    asyncio.run(run())


class Slow(Idle):
    """An engine that compiles a grammar until `compiled` is set."""

    def __init__(self) -> None:
        self.compiling, self.compiled = threading.Event(), threading.Event()
        self.running: set[str] = set()

    def submit(self, request: Request, sink: object) -> None:
        self.compiling.set()
        assert self.compiled.wait(20)
        if request.id == "bad":
            raise ConfigError("no grammar")
        self.running.add(request.id)

    def abort(self, request: str) -> None:
        self.running.discard(request)


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "bad"]])
def test_who_hangs_up_while_a_grammar_compiles_leaves_nothing_running(names: list[str]) -> None:
    engine: Any = Slow()
    requests = [Request(name, [1], SamplingParams()) for name in names]
    call: Any = SimpleNamespace(requests=requests, invalid=lambda error: ApiError("invalid", str(error)))

    async def run() -> None:
        async with Exchange(Mailbox(engine), 0.0, lambda _: None) as exchange:
            submitting = asyncio.create_task(asyncio.to_thread(exchange.submit, call))
            await asyncio.to_thread(engine.compiling.wait, 20)
        engine.compiled.set()
        await asyncio.wait([submitting], timeout=20)
        assert (submitting.exception() is not None) == ("bad" in names)

    asyncio.run(run())
    assert not engine.running


def test_an_output_of_an_aborted_request_may_stand_before_the_reason() -> None:
    async def run() -> None:
        engine: Any = Idle()
        async with Exchange(Mailbox(engine), 0.0, lambda _: None) as exchange:
            never: asyncio.Task[Any] = asyncio.create_task(asyncio.sleep(60))
            exchange._queue.put_nowait(Output("a", 0, finish=FinishReason.ABORT))
            exchange.end(ApiError("unavailable", "shutting down"))
            await exchange.checking(never)

    with pytest.raises(ApiError, match="shutting down"):
        asyncio.run(run())


def test_the_event_loop_is_woken_once_for_the_outputs_of_a_step(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, params = server.served.engine, SamplingParams(max_tokens=20, ignore_eos=True)

    async def run() -> tuple[list[int], int]:
        mailbox, woken = Mailbox(engine), []
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def count(*arguments: Any) -> Any:
            woken.append(arguments)
            return wake(*arguments)

        monkeypatch.setattr(loop, "call_soon_threadsafe", count)

        async def ask(number: int) -> int:
            call: Any = SimpleNamespace(requests=[Request(f"exchange {number}", [100 + number], params)])
            async with Exchange(mailbox, 0.0, lambda _: None) as exchange:
                exchange.submit(call)
                ((output,),) = await exchange.all(call)
            return len(output.ids)

        return list(await asyncio.gather(*map(ask, range(16)))), len(woken)

    before = engine.stats().steps
    found, woken = asyncio.run(run())
    assert found == [20] * 16
    assert woken <= engine.stats().steps - before
