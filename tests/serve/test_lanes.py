"""Work beside the event loop is taken from tenants in turn, and what nobody waits for any more is dropped."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import MESSAGES, Running

from squawq.serve.limits import SMALL, FairPool


def done_in_order(tenants: str, cancelled: set[int]) -> list[int]:
    """The order in which a pool of one thread does pieces of work, queued for these tenants while it was busy."""
    order: list[int] = []
    go_on = threading.Event()

    async def run() -> None:
        pool = FairPool(1, "test")
        busy = asyncio.create_task(pool.run("first", lambda: go_on.wait(20)))
        await asyncio.sleep(0)

        def piece(number: int) -> Callable[[], None]:
            return lambda: order.append(number)

        tasks = [asyncio.create_task(pool.run(name, piece(number))) for number, name in enumerate(tenants)]
        await asyncio.sleep(0)
        for number in cancelled:
            tasks[number].cancel()
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(busy, *tasks, return_exceptions=True)
        assert [task.cancelled() for task in tasks] == [number in cancelled for number in range(len(tasks))]
        assert not pool._queues
        pool.close()

    asyncio.run(run())
    return order


@given(st.text("abc", max_size=12), st.sets(st.integers(0, 11)))
def test_tenants_are_served_in_turn_and_nothing_is_lost(tenants: str, cancelled: set[int]) -> None:
    cancelled = {number for number in cancelled if number < len(tenants)}
    order = done_in_order(tenants, cancelled)
    assert sorted(order) == [number for number in range(len(tenants)) if number not in cancelled]
    done: Counter[str] = Counter()
    left = Counter(tenants[number] for number in order)
    for place, number in enumerate(order):
        own = tenants[number]
        assert all(tenants[later] != own or later >= number for later in order[place:]), "a tenant's own are in order"
        done[own] += 1
        left[own] -= 1
        assert all(done[own] <= done[other] + 1 for other, count in left.items() if count)


def test_one_piece_of_a_busy_tenant_is_before_another_tenants() -> None:
    assert done_in_order("a" * 50 + "b", set()).index(50) == 1


def test_what_is_cancelled_is_let_go_though_its_turn_did_not_come() -> None:
    class Body:
        pass

    async def run() -> None:
        pool, go_on = FairPool(1, "test"), threading.Event()
        busy = asyncio.create_task(pool.run("a", lambda: go_on.wait(20)))
        await asyncio.sleep(0)
        body = Body()
        held = weakref.ref(body)
        waiting = asyncio.create_task(pool.run("a", partial(id, body)))
        await asyncio.sleep(0)
        del body
        assert held() is not None
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        del waiting
        gc.collect()
        assert held() is None
        go_on.set()
        assert await busy
        pool.close()

    asyncio.run(run())


def test_an_error_is_raised_and_holds_nothing() -> None:
    class RefusedError(Exception):
        pass

    async def run() -> weakref.ref[Exception]:
        pool = FairPool(1, "test")

        def work() -> None:
            raise RefusedError("no")

        try:
            await pool.run("a", work)
        except RefusedError as error:
            return weakref.ref(error)
        finally:
            pool.close()
        raise AssertionError

    gc.disable()
    try:
        assert asyncio.run(run())() is None, "the error is part of a cycle"
    finally:
        gc.enable()


def test_a_closed_lane_leaves_nobody_waiting() -> None:
    async def run() -> None:
        pool, go_on = FairPool(1, "test"), threading.Event()
        tasks = [asyncio.create_task(pool.run("a", lambda: go_on.wait(20))) for _ in range(3)]
        await asyncio.sleep(0.01)
        pool.close()
        go_on.set()
        first, *others = await asyncio.gather(*tasks, return_exceptions=True)
        assert first is True
        assert all(isinstance(other, asyncio.CancelledError) for other in others)

    asyncio.run(run())


def test_a_large_body_is_rendered_in_a_process_of_its_own(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of it is large; a small body never waits there, however it is spelled."""
    used = []
    for number, process in enumerate(server.served._templates):

        def render(*chat: Any, number: int = number, render: Any = process.render, **options: Any) -> Any:
            used.append(number)
            return render(*chat, **options)

        monkeypatch.setattr(process, "render", render)
    spelled = {"messages": [{"role": "user", "content": "\xa0" * 20_000}], "truncate_prompt_tokens": 5}
    assert len(str(spelled)) > SMALL
    for body in ({"messages": MESSAGES}, {"messages": MESSAGES, "user": "x" * SMALL}, spelled):
        assert server.post("/v1/chat/completions", {**body, "max_tokens": 1}).status_code == 200
    assert used == [0, 1, 0]
