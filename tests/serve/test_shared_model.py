"""A server whose model is shared by processes: it answers, and ends when one of them does."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from running import process

from squawq.backends.cpu import library
from squawq.demo import demo_model

pytestmark = pytest.mark.skipif(library.load() is None, reason="needs the native kernels")


def followers(pid: int) -> list[int]:
    """The processes that the server has started to share its model."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"squawq.engine.followers" in (path.parent / "cmdline").read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # ended meanwhile
            continue
    return found


def chat(url: str) -> dict[str, Any]:
    told = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 12, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(told).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.loads(answer.read())
        return found


def test_a_server_ends_with_a_process_that_shares_its_model() -> None:
    lines: list[str] = []
    arguments = ["serve", str(demo_model()), "--port", "0", "--device", "cpu", "--threads", "1"]
    with process(arguments) as (_, url):
        wanted = chat(url)["choices"][0]["message"]["content"]
    with process([*arguments, "--tensor-parallel-size", "4"], lines=lines) as (server, url):
        assert chat(url)["choices"][0]["message"]["content"] == wanted
        pids = followers(server.pid)
        assert len(pids) == 3
        began = time.monotonic()
        os.kill(pids[0], signal.SIGKILL)
        assert server.wait(20) == 1
        assert time.monotonic() - began < 10
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.monotonic() - began < 10
            time.sleep(0.05)
    (last,) = [line for line in lines if "cannot run any more" in line]
    assert "of the 4 that run the model was killed by SIGKILL" in last
