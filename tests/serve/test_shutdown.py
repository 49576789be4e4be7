"""How a server ends: signals to one in a process of its own, with requests under way."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import programs
from running import DEFAULTS, process

LONG = 3000  # tokens: far more than are generated before a signal
SLOW = """
import time
from squawq.cli import entry
from squawq.engine.runner import DecoderRunner
from squawq.text.tokenizer import Tokenizer
DecoderRunner.start = Tokenizer.encode = lambda *_: time.sleep(600)
raise SystemExit(entry())
"""


@contextmanager
def serving(*flags: str, **options: Any) -> Iterator[tuple[programs.Program, str]]:
    arguments = ["serve", DEFAULTS["model"], "--port", "0", "--threads", "1", "--kv-tokens", "16384", *flags]
    with process(arguments, **options) as found:
        yield found


def post(url: str, path: str, body: Any) -> HTTPConnection:
    """A request whose answer is still to be read."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", "Connection": "close"})
    return connection


def completion(url: str, tokens: int, stream: bool = False, prompt: str | list[int] = "Once") -> HTTPConnection:
    return post(url, "/v1/completions", {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": stream})


def begun(url: str, tokens: int) -> list[HTTPResponse]:
    """Streams whose first token has come."""
    streams = [connection.getresponse() for connection in [completion(url, tokens, stream=True) for _ in range(4)]]
    assert all(stream.readline().startswith(b"data: ") for stream in streams)
    return streams


def reason(stream: HTTPResponse) -> str:
    """Why a stream ended; it must be whole."""
    *_, last, done, nothing = stream.read().split(b"\n\n")
    assert (done, nothing) == (b"data: [DONE]", b"")
    return str(json.loads(last.removeprefix(b"data: "))["choices"][0]["finish_reason"])


def answer(connection: HTTPConnection) -> tuple[int, Any]:
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


def get(url: str, path: str) -> tuple[int, str]:
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("GET", path, headers={"Connection": "close"})
    response = connection.getresponse()
    return response.status, response.read().decode()


def running(url: str) -> float:
    """How many sequences are under way."""
    return float(re.findall(r"^vllm:num_requests_running\S+ (\S+)$", get(url, "/metrics")[1], re.MULTILINE)[0])


def drain(server: programs.Program, url: str, number: signal.Signals = signal.SIGTERM) -> None:
    """Send a signal and wait until it was noticed."""
    server.send_signal(number)
    until(lambda: get(url, "/readyz")[0] == 503)


def parent(stat: Path) -> int | None:
    """A process's parent; None for one that has ended."""
    try:
        state, found = stat.read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else int(found)


def family(server: programs.Program) -> list[int]:
    """The processes that a server started, and those that they did."""
    parents = {int(stat.parent.name): parent(stat) for stat in Path("/proc").glob("[0-9]*/stat")}
    found = [server.pid]
    for known in found:  # which grows
        found += [pid for pid, above in parents.items() if above == known]
    assert found[1:] or not parents, "no process renders templates"
    return found[1:]


def assert_ended(server: programs.Program, children: list[int]) -> None:
    assert server.wait(60) == 0
    until = time.monotonic() + 10
    while left := [pid for pid in children if parent(Path(f"/proc/{pid}/stat")) is not None]:
        assert time.monotonic() < until, f"processes {left} are left"
        time.sleep(0.05)


def test_requests_finish() -> None:
    with serving() as (server, url):
        schema = {"prompt": "Once", "max_tokens": 4, "response_format": {"type": "json_object"}}
        assert answer(post(url, "/v1/completions", schema))[0] == 200  # grammars have processes too
        whole, streams, children = completion(url, 400), begun(url, 400), family(server)
        drain(server, url)
        assert answer(completion(url, 1))[0] == 503
        assert answer(post(url, "/tokenize", {"prompt": "a"}))[0] == 503
        assert [reason(stream) for stream in streams] == ["length"] * 4
        status, body = answer(whole)
        assert (status, body["choices"][0]["finish_reason"]) == (200, "length")
        assert_ended(server, children)


def test_a_second_signal_aborts() -> None:
    with serving() as (server, url):
        streams, children = begun(url, LONG), family(server)
        drain(server, url, signal.SIGINT)
        assert answer(completion(url, 1))[0] == 503
        server.send_signal(signal.SIGTERM)
        assert [reason(stream) for stream in streams] == ["abort"] * 4
        assert_ended(server, children)


def test_without_time_requests_are_aborted() -> None:
    with serving("--shutdown-timeout", "0") as (server, url), socket.socket() as deaf, socket.socket() as slow:
        address = (urlsplit(url).hostname, urlsplit(url).port)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.connect(address)
        body = json.dumps({"prompt": "Once", "max_tokens": LONG, "ignore_eos": True, "stream": True, "logprobs": 20})
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        deaf.sendall(f"{head}\r\n\r\n{body}".encode())
        slow.connect(address)
        slow.sendall(f"{head}\r\n\r\n{body[:-1]}".encode())
        grammar = {"type": "regex", "value": "[a-z]{2000}"}  # so that it does not end by itself
        own = post(url, "/generate", {"inputs": "Once", "parameters": {"grammar": grammar}})
        whole, streams = completion(url, LONG), begun(url, LONG)
        until(lambda: running(url) == 7)
        children = family(server)
        server.send_signal(signal.SIGTERM)
        assert [reason(stream) for stream in streams] == ["abort"] * 4
        status, found = answer(whole)
        assert (status, found["choices"][0]["finish_reason"]) == (200, "abort")
        assert answer(own) == (503, {"error": "Incomplete generation", "error_type": "incomplete_generation"})
        assert_ended(server, children)


def test_neither_a_step_nor_a_check_that_takes_long_keeps_the_server(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    options: dict[str, Any] = {"module": "slow", "environment": {"PYTHONPATH": str(tmp_path)}}
    with serving("--shutdown-timeout", "0", **options) as (server, url):
        checked = completion(url, 3)
        waiting = [completion(url, 3, stream, prompt=[5]) for stream in (False, True)]
        until(lambda: running(url) > 0)
        time.sleep(0.3)  # the others' arrival shows nowhere
        children = family(server)
        server.send_signal(signal.SIGTERM)
        assert [answer(connection)[0] for connection in waiting] == [503, 503]
        assert_ended(server, children)
        checked.close()
