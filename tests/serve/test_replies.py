"""JSON in pieces is the same JSON; a budget is shared in order, and no share is lost."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squawq.serve import call
from squawq.serve.budget import Budget
from squawq.serve.call import Rows, dump, pieces
from squawq.serve.responses import BLOCK, blocks, events

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES, st.integers(1, 3), st.integers(1, 3))
def test_pieces_are_the_same_json(value: Any, rows: int, items: int) -> None:
    before = call._ROWS, call._ITEMS
    call._ROWS, call._ITEMS = rows, items
    try:
        assert "".join(pieces(value)) == dump(value)
        lazy = {"a": [Rows(lambda item: {"b": item}, [value] * 3), 1], "c": Rows(str, [])}
        assert json.loads("".join(pieces(lazy))) == json.loads(dump(lazy)) == {"a": [[{"b": value}] * 3, 1], "c": []}
    finally:
        call._ROWS, call._ITEMS = before


def test_no_piece_is_large_and_rows_are_not_held() -> None:
    made: list[int] = []
    rows = Rows(lambda i: made.append(i) or {"i": i}, range(100_000))  # type: ignore[func-returns-value]
    found = pieces({"rows": rows})
    next(found)
    next(found)
    assert len(made) < 1000
    assert max(map(len, found)) < BLOCK
    text = b"".join(blocks({"rows": rows}))
    assert len(json.loads(text)["rows"]) == 100_000
    assert max(map(len, blocks({"rows": rows}))) < 2 * BLOCK
    assert b"".join(events(["a" * 3 * BLOCK, "b"])) == b"data: " + b"a" * 3 * BLOCK + b"\n\ndata: b\n\n"


def test_lines_do_not_end_within_json() -> None:
    assert dump("a\x85b\u2028c\u2029d") == '"a\\u0085b\\u2028c\\u2029d"'
    with pytest.raises(TypeError):
        dump({1, 2})


def test_a_budget_is_shared_in_order() -> None:
    async def run() -> list[str]:
        budget, said = Budget(10), []

        async def hold(name: str, amount: int, release: asyncio.Event) -> None:
            async with budget.take(amount):
                said.append(name)
                await release.wait()

        first, rest = asyncio.Event(), asyncio.Event()
        tasks = [asyncio.create_task(hold(*each)) for each in (("a", 8, first), ("b", 9, rest), ("c", 2, rest))]
        free = asyncio.create_task(hold("d", 0, rest))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert said == ["a", "d"], "c would fit, but b came before"
        tasks[1].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert said == ["a", "d", "c"]
        first.set()
        rest.set()
        await asyncio.gather(*tasks, free, return_exceptions=True)
        async with budget.take(10):
            return said

    assert asyncio.run(run()) == ["a", "d", "c"]


def test_a_share_that_came_with_the_cancellation_is_given_back() -> None:
    async def run() -> None:
        budget = Budget(1)

        async def hold() -> None:
            async with budget.take(1):
                pass

        async with budget.take(1):
            waiting = asyncio.create_task(hold())
            await asyncio.sleep(0)
        waiting.cancel()  # its turn has come, but it has not run since
        await asyncio.gather(waiting, return_exceptions=True)
        async with asyncio.timeout(20), budget.take(1):
            pass

    asyncio.run(run())
