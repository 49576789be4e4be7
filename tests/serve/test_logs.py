"""A record is one line of printable ASCII, whatever it holds, and reads back as what was logged."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_operations import until

from squawq.errors import ConfigError
from squawq.serve import server
from squawq.serve.logs import LIMITED, MAX_LINES, MAX_VALUE, Formatter, event, setup
from squawq.serve.settings import ServerSettings

NAMES = ("squawq", "uvicorn", "asyncio", "uvicorn.access", "uvicorn.error")
logger = logging.getLogger("squawq.serve.test")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(one.handlers[:], one.propagate, one.level) for one in loggers]
    yield
    for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


def record(message: str = "request", **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("squawq", logging.INFO, __file__, 1, "%s", (message,), None)
    made.created = 1767268800.0  # 2026-01-01T12:00:00Z
    made.fields = fields
    return made


def text(message: str = "request", **fields: object) -> str:
    return Formatter("text").format(record(message, **fields))


def test_text() -> None:
    line = text("request", id="cmpl-1", route="/v1/completions", status=200, seconds=0.25, stream=True, n=None)
    assert line == (
        "2026-01-01T12:00:00Z INFO request id=cmpl-1 route=/v1/completions status=200 seconds=0.25 stream=true n=null"
    )


def test_text_that_is_not_a_word_is_quoted() -> None:
    assert text("the server started", a="", b='say "x" y=1', c="ü", d="x\\y").partition(" INFO ")[2] == (
        '"the server started" a="" b="say \\"x\\" y=1" c="\\u00fc" d="x\\\\y"'
    )


def test_json() -> None:
    line = Formatter("json").format(record("request", id="a\nb", status=200, seconds=0.25, stream=False, model=None))
    assert json.loads(line) == {
        "time": "2026-01-01T12:00:00Z",
        "level": "INFO",
        "event": "request",
        "id": "a\nb",
        "status": 200,
        "seconds": 0.25,
        "stream": False,
        "model": None,
    }


def test_no_field_takes_the_place_of_the_head() -> None:
    found = json.loads(Formatter("json").format(record(time="never", level="CALM", event="nothing", x=1)))
    assert (found["time"], found["level"], found["event"], found["x"]) == ("2026-01-01T12:00:00Z", "INFO", "request", 1)


def test_a_request_cannot_forge_a_line_or_reach_the_terminal() -> None:
    forged = "x\n2026-01-01T12:00:00Z ERROR forged key=value\r\x1b[2J\x7f\x9b\u2028\u202e\ud800"
    for form in ("text", "json"):
        line = Formatter(form).format(record(forged, key=forged, **{f"a {forged}": 1}))
        assert line.isascii()
        assert line.isprintable()
        assert " ERROR forged key=value" in line


@pytest.mark.parametrize("form", ["text", "json"])
def test_values_are_bounded(form: str) -> None:
    line = Formatter(form).format(record("e" * 10**6, key="k" * 10**6, mean=["x"] * 10**5, **{"n" * 10**6: 1}))
    assert len(line) < 5 * MAX_VALUE
    assert "k" * (MAX_VALUE - 3) + "..." in line
    assert "k" * (MAX_VALUE - 2) not in line


def test_values_that_json_does_not_have() -> None:
    class Bad:
        def __str__(self) -> str:
            raise RuntimeError

    line = Formatter("json").format(record(a=math.nan, b=math.inf, c=10**5000, d=b"x", e=Bad(), f=2**63 - 1))
    assert json.loads(line, parse_constant=pytest.fail) | {"time": ""} == {
        "time": "",
        "level": "INFO",
        "event": "request",
        "a": "nan",
        "b": "inf",
        "c": "<int>",
        "d": "b'x'",
        "e": "<Bad>",
        "f": 2**63 - 1,
    }


def test_an_exception_is_part_of_its_line_and_keeps_its_end() -> None:
    try:
        raise ValueError("a\nb" + "x" * 20_000 + " at last")
    except ValueError:
        made = record()
        made.exc_info = sys.exc_info()
    line = Formatter("json").format(made)
    assert line.isprintable()
    assert len(line) < 10_000
    assert json.loads(line)["exception"].endswith(" at last")
    assert " at last" in Formatter("text").format(made)


VALUES: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()))
    | st.binary()
)


@given(st.text(), st.dictionaries(st.text(), VALUES, max_size=4))
def test_any_record_is_one_line_that_reads_back(message: str, fields: dict[str, Any]) -> None:
    line = Formatter("json").format(record(message, **fields))
    assert line.isascii()
    assert line.isprintable()
    found = json.loads(line)
    assert found["event"] == (message if len(message) <= MAX_VALUE else message[: MAX_VALUE - 3] + "...")
    line = text(message, **fields)
    assert line.isascii()
    assert line.isprintable()
    word = r'(?:[\w.:/@+-]+|"(?:[^"\\]|\\.)*")'
    assert re.fullmatch(rf"\S+Z INFO {word}(?: {word}={word})*", line, re.ASCII)


@pytest.mark.parametrize("form", ["text", "json"])
def test_setup_sends_squawq_and_uvicorn_to_stderr(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("uvicorn.access").handlers = [logging.StreamHandler()]
    setup(form, "warning")
    writer = setup(form, "info")  # again: no line comes twice
    event(logger, logging.INFO, "started", name="m", level=3, port=8000)
    event(logger, logging.DEBUG, "detail")
    logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", "/x\ny", "1.1", 200)
    logging.getLogger("uvicorn.error").warning("hm")
    assert writer.close(20)
    found = capsys.readouterr()
    assert found.out == ""
    lines = found.err.splitlines()
    assert len(lines) == 3
    if form == "json":
        events = [json.loads(line) for line in lines]
        assert events[0] | {"time": ""} == {
            "time": "",
            "level": "INFO",
            "event": "started",
            "name": "m",
            "port": 8000,
        }
        assert [one["event"] for one in events[1:]] == ['1.2.3.4:5 - "GET /x\ny HTTP/1.1" 200', "hm"]
    else:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO started name=m level=3 port=8000", lines[0])
        assert lines[2].endswith(" WARNING hm")


def test_the_level_holds(capsys: pytest.CaptureFixture[str]) -> None:
    writer = setup("text", "ERROR")
    event(logger, logging.WARNING, "quiet")
    event(logger, logging.ERROR, "loud")
    assert writer.close(20)
    assert "quiet" not in (err := capsys.readouterr().err)
    assert "ERROR loud" in err


def test_a_reader_that_stalls_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that find the queue full are dropped; how many is said as soon as somebody reads again."""
    end, start = os.pipe()
    with os.fdopen(start, "w") as stalled:
        monkeypatch.setattr(sys, "stderr", stalled)
        writer = setup("text", "info")
        count = 3 * MAX_LINES
        for number in range(count):  # far more bytes than a pipe holds
            event(logger, logging.INFO, "line", number=number, filler="x" * 100)
        assert not writer.close(0.05)
        with os.fdopen(end, "rb") as reader, ThreadPoolExecutor(1) as pool:
            lines = pool.submit(lambda: [*takewhile(lambda line: b"last" not in line, reader)])
            assert until(lambda: not writer._lines.unfinished_tasks)
            event(logger, logging.INFO, "last")
            found = lines.result(20)
            assert writer.close(20)
    kept = sum(b"INFO line " in line for line in found)
    dropped = [int(line.partition(b"lines=")[2]) for line in found if b"dropped" in line]
    assert MAX_LINES <= kept < count
    assert kept + sum(dropped) == count


def test_lines_that_anybody_can_cause_are_limited(capsys: pytest.CaptureFixture[str]) -> None:
    writer = setup("text", "info")
    count = 3 * LIMITED
    for number in range(count):
        event(logger, logging.INFO, "forbidden", limited=True, number=number)
        event(logger, logging.INFO, "answered", number=number)
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    assert writer.close(20)
    lines = capsys.readouterr().err.splitlines()
    limited = sum(" forbidden " in line or "Invalid" in line for line in lines)
    suppressed = [int(line.partition("lines=")[2]) for line in lines if "suppressed" in line]
    assert limited + sum(suppressed) == 2 * count
    assert limited < count
    assert sum(" answered " in line for line in lines) == count


@pytest.mark.parametrize(("form", "level", "choices"), [("xml", "info", "text, json"), ("text", "loud", "debug, info")])
def test_unknown_settings_are_refused(form: str, level: str, choices: str) -> None:
    before = logging.getLogger("squawq").handlers
    with pytest.raises(ConfigError, match=choices):
        setup(form, level)
    assert logging.getLogger("squawq").handlers is before


def test_the_log_is_closed_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine's end has to say is written."""
    order: list[str] = []

    class Fake:
        started, failed = True, False

        def __init__(self, *_: object) -> None:
            pass

        def run(self, _: object) -> None:
            order.append("run")

        def close(self, _: float = 0) -> bool:
            order.append("log")
            return True

    def close(_: object) -> bool:
        order.append("engine")
        return True

    for name in ("Served", "Server", "Api"):
        monkeypatch.setattr(server, name, Fake)
    for name, found in (("_close", close), ("bind", lambda _: None)):
        monkeypatch.setattr(server, name, found)
    monkeypatch.setattr("squawq.serve.logs.setup", Fake)
    monkeypatch.setattr("gc.freeze", lambda: None)
    assert server.run(ServerSettings(model="m")) == 0
    assert order == ["run", "engine", "log"]
