"""JSON in pieces is the same JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squawq.serve import http
from squawq.serve.http import BLOCK, LazyList, blocks, dump, events, pieces

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES, st.integers(1, 3), st.integers(1, 3))
def test_pieces_are_the_same_json(value: Any, rows: int, items: int) -> None:
    before = http._ROWS, http._ITEMS
    http._ROWS, http._ITEMS = rows, items
    try:
        assert "".join(pieces(value)) == dump(value)
        lazy = {"a": [LazyList(lambda item: {"b": item}, [value] * 3), 1], "c": LazyList(str, [])}
        assert json.loads("".join(pieces(lazy))) == json.loads(dump(lazy)) == {"a": [[{"b": value}] * 3, 1], "c": []}
    finally:
        http._ROWS, http._ITEMS = before


def test_no_piece_is_large_and_rows_are_not_held() -> None:
    made: list[int] = []
    rows = LazyList(lambda i: made.append(i) or {"i": i}, range(100_000))  # type: ignore[func-returns-value]
    found = pieces({"rows": rows})
    next(found)
    next(found)
    assert len(made) < 1000
    assert max(map(len, found)) < BLOCK
    text = b"".join(blocks({"rows": rows}))
    assert len(json.loads(text)["rows"]) == 100_000
    assert max(map(len, blocks({"rows": rows}))) < 2 * BLOCK
    assert b"".join(events(["a" * 3 * BLOCK, "b"])) == b"data: " + b"a" * 3 * BLOCK + b"\n\ndata: b\n\n"
    value = {"rows": LazyList(str, [1, 2]), "text": "é"}
    assert events([value, "[DONE]"]) == events([value, "[DONE]"], large=True)
    assert events([value]) == ['data: {"rows":["1","2"],"text":"é"}\n\n'.encode()]


def test_lines_do_not_end_within_json() -> None:
    assert dump("a\x85b\u2028c\u2029d") == '"a\\u0085b\\u2028c\\u2029d"'
    with pytest.raises(TypeError):
        dump({1, 2})
