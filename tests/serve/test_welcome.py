"""What a server says on a terminal: the lines for each setting, and the curl line run as pasted."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from running import Running

from squawq.demo import demo_model
from squawq.serve.logs import Formatter
from squawq.serve.model import Served
from squawq.serve.welcome import curl, welcome

AT = "http://127.0.0.1:8000"


def changed(served: Served, **settings: object) -> Served:
    """The same model with other settings."""
    found = copy.copy(served)
    found.settings = replace(served.settings, **settings)  # type: ignore[arg-type]
    return found


def test_what_is_served_and_where(served: Served) -> None:
    lines = welcome(served, AT).splitlines()
    assert lines[0].split(maxsplit=1) == ["model", "demo_model (llama, 16-bit)"]
    assert lines[1].startswith("runs on   cpu, engine squawq, threads ")
    assert lines[2] == "context   4,096 tokens; the KV cache holds 4,096"
    assert lines[3:8] == [
        f"chat      {AT}/",
        f"status    {AT}/status",
        f"API docs  {AT}/docs",
        f"API       {AT}/v1",
        "try it:",
    ]
    assert lines[8] == curl(served, AT)
    assert len(lines) == 9


def test_no_pages_without_web_or_on_a_socket(served: Served) -> None:
    for settings in ({"web": False}, {"uds": Path("/tmp/s.sock")}):
        text = welcome(changed(served, **settings), AT)
        assert "/status" not in text
        assert "/docs" not in text
        assert "/v1" in text


@pytest.mark.parametrize(
    ("settings", "at", "words"),
    [
        ({}, "http://0.0.0.0:80", ["curl", "http://127.0.0.1:80/v1/chat/completions"]),
        ({}, "http://[::]:80", ["curl", "http://[::1]:80/v1/chat/completions"]),
        ({}, "https://127.0.0.1:80", ["curl", "-k", "https://127.0.0.1:80/v1/chat/completions"]),
        ({}, "https://llm.example:443", ["curl", "https://llm.example:443/v1/chat/completions"]),
        ({"api_keys": ("secret",)}, AT, ["-H", "Authorization: Bearer YOUR_KEY"]),
        ({"uds": Path("a b.sock")}, "a b.sock", ["--unix-socket", "a b.sock", "http://localhost/v1/chat/completions"]),
        ({"dialect": "tgi"}, AT, ["curl", f"{AT}/generate"]),
    ],
)
def test_the_request_fits_the_settings(settings: dict[str, object], at: str, words: list[str], served: Served) -> None:
    found = shlex.split(welcome(changed(served, **settings), at).splitlines()[-1])
    assert any(found[i : i + len(words)] == words for i in range(len(found))), found
    assert "secret" not in " ".join(found)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs the program curl")
def test_the_request_works_as_pasted(server: Running, tgi_server: Running) -> None:
    for running, key in ((server, "choices"), (tgi_server, "generated_text")):
        line = welcome(running.served, running.url).splitlines()[-1]
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert key in json.loads(done.stdout)


def test_a_log_for_machines_stays_json() -> None:
    record = logging.LogRecord("squawq", logging.INFO, "", 0, "%s", ("a\nb",), None)
    record.as_it_is = True
    assert Formatter("text").format(record) == "a\nb"
    assert json.loads(Formatter("json").format(record))["event"] == "a\nb"


@pytest.mark.parametrize("form", ["text", "json"])
def test_only_a_terminal_sees_it_and_no_log_in_json(form: str) -> None:
    master, slave = os.openpty()
    command = [sys.executable, "-m", "squawq", "serve", str(demo_model()), "--port", "0", "--threads", "1"]
    child = subprocess.Popen([*command, "--kv-tokens", "4096", "--log-format", form], stderr=slave, stdin=slave)
    os.close(slave)
    try:
        shown, until = b"", time.monotonic() + 120
        while b"serving" not in shown and time.monotonic() < until:
            shown += os.read(master, 65536)
        child.send_signal(signal.SIGTERM)
        while time.monotonic() < until:
            try:
                shown += os.read(master, 65536)
            except OSError:  # its end
                break
        assert child.wait(30) == 0
    finally:
        child.kill()
        child.wait(10)
        os.close(master)
    assert (b"try it:\r\ncurl http://127.0.0.1:" in shown) == (form == "text")
    if form == "json":
        assert re.findall(rb'"event": "(\w+)"', shown) == [b"serving", b"draining"]
