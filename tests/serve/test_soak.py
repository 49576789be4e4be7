"""A short soak, by the benchmark's means: what the engine alone answers is what comes over HTTP among clients that hang
up, send nonsense or hardly read; and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from running import Running

from squawq.serve.model import Served
from squawq.serve.runtime import Exchange

COUNT = 300


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc").exists() else 0


def threads() -> int:
    """How many there are beside those of pools, which start when they are needed."""
    return sum(not thread.name.startswith(("asyncio_", "squawq-validation")) for thread in threading.enumerate())


def test_a_hang_up_leaves_nothing_behind(server: Running) -> None:
    def exchanges() -> int:
        return sum(type(found) is Exchange for found in gc.get_objects())

    address = (urlsplit(server.url).hostname, urlsplit(server.url).port)
    body = b'{"prompt": "Once", "max_tokens": 3000, "ignore_eos": true}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    before = server.served.engine.stats().tokens_generated
    gc.collect()
    gc.disable()
    try:
        with socket.create_connection(address) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            until = time.monotonic() + 20
            while not server.served.engine.stats().running:
                assert time.monotonic() < until
                time.sleep(0.01)
            assert exchanges() == 1
        assert server.idle()
        assert server.served.engine.stats().tokens_generated - before < 3000, "nobody told the engine"
        while exchanges():
            assert time.monotonic() < until + 20, "a request is held"
            time.sleep(0.05)
    finally:
        gc.enable()


def test_answers_are_the_engines(server: Running, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from http_client import ask
    from serve_soak import make_cases, soak

    port = urlsplit(server.url).port
    assert port is not None
    cases = make_cases(served.engine, served.tokenizer)

    async def all_at_once() -> list[str | None]:
        answers = await asyncio.gather(*(ask(port, case.request) for case in cases))
        return [case.wrong(answer) for case, answer in zip(cases, answers, strict=True)]

    assert not [wrong for wrong in asyncio.run(all_at_once()) if wrong]
    assert server.idle()
    before, files = threads(), open_files()
    tally = asyncio.run(soak(port, cases, COUNT, at_once=16, seed=1))
    assert not tally.wrong
    assert not tally.unexpected
    assert tally.equal + tally.aborted + tally.bad == COUNT
    assert min(tally.slow, tally.aborted, tally.bad) > 0
    assert server.idle()
    until = time.monotonic() + 20
    while open_files() > files or threads() > before:
        gc.collect()  # what an exception's frames hold is no leak
        assert time.monotonic() < until, "files or threads are left"
        time.sleep(0.05)
