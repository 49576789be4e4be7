"""A server on a free port of this machine, with the demo model, in a thread of the test's process or in its own."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import programs

from squawq.demo import demo_model
from squawq.serve.app import Api
from squawq.serve.model import Served
from squawq.serve.server import Server
from squawq.serve.settings import ServerSettings

MESSAGES = [{"role": "user", "content": "Tell me a story."}]
DEFAULTS: dict[str, Any] = {"model": str(demo_model()), "port": 0, "threads": 1, "kv_tokens": 8192}


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    server: Server
    thread: threading.Thread

    @property
    def served(self) -> Served:
        return self.server.api.served

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def idle(self, seconds: float = 20) -> bool:
        """Whether within so many seconds nothing is under way and every page is free."""
        engine, runtime = self.served.engine, self.server.api.runtime
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            stats = engine.stats()
            if not (runtime.in_flight or stats.running or stats.waiting or stats.pages_used):
                return True
            time.sleep(0.02)
        return False


@contextmanager
def running(**changes: Any) -> Iterator[Running]:
    """A server in a thread; settings as keywords."""
    served = Served(ServerSettings(**{**DEFAULTS, **changes}))
    server = Server(Api(served))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < until, "the server did not start"
            time.sleep(0.01)
        scheme = "https" if changes.get("ssl_certfile") else "http"
        yield Running(f"{scheme}://127.0.0.1:{server.bound_port}", server, thread)
    finally:
        server.stop()
        server.stop()  # do not wait for what is under way
        thread.join(20)
        served.close()
        assert not thread.is_alive(), "the server did not end"


@contextmanager
def process(
    arguments: list[str],
    environment: Mapping[str, str] | None = None,
    module: str = "squawq",
    lines: list[str] | None = None,
) -> Iterator[tuple[programs.Program, str]]:
    """A server in a process of its own, and its URL, read from its log, whose lines go to `lines`; killed at the end if
    it still runs."""
    command = ["-m", module, *arguments]
    child = programs.Program(command, stderr=subprocess.PIPE, env={**os.environ, **(environment or {})})
    assert child.stderr is not None
    lines = [] if lines is None else lines
    reader: threading.Thread | None = None
    try:
        for line in child.stderr:
            lines.append(line)
            if " serving " in line:
                url = next(word.removeprefix("at=") for word in line.split() if word.startswith("at="))
                break
        else:
            raise AssertionError("the server did not start: " + "".join(lines))
        reader = threading.Thread(target=lambda: lines.extend(child.stderr or ()), daemon=True)
        reader.start()
        yield child, url.replace("0.0.0.0", "127.0.0.1")
    finally:
        if child.poll() is None:
            child.kill()
        child.wait(10)
        if reader is not None:
            reader.join(10)
        child.stderr.close()
