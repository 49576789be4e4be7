"""HTTP by hand, for what no client library would send: bytes over a socket, and what came back. A server in a process
of its own that is attacked so, and what that process takes of the machine.
"""

from __future__ import annotations

import json
import re
import select
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from running import MESSAGES, process

from squawq.demo import demo_model

HANG = 60.0  # seconds of silence after which a server counts as hung, on a slow machine too
MOST = 64 * 1024  # bytes of a reply that is read; no refusal is longer
JSON = {"content-type": "application/json"}
MEGABYTE = 2**20
Case = tuple[str, bytes]  # a path and a body; or "" and a whole request
CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 1}
COMPLETION: dict[str, Any] = {"prompt": "Once", "max_tokens": 1}
NUMBERS = ["0", "-0", "1", "-1", "1.5", "1e-320", "-1e308", "1e308", "1e309", "NaN", "-Infinity", "true", '"1"', "[1]"]
NUMBERS += [str(sign * 2**bits + more) for bits in (7, 15, 31, 32, 53, 63, 64) for sign in (1, -1) for more in (-1, 0)]
NUMBERS += ["1" + "0" * 400, "-1" + "0" * 4000, "1" + "0" * 5000, "1" * 20 + ".0", "1e999999999", "01", "1_0", "0x1"]
GENERATE: dict[str, Any] = {"inputs": "Once", "parameters": {"max_new_tokens": 1}}


@dataclass(frozen=True)
class Reply:
    """An answer; `status` 0: the connection was closed without one. `body`: a byte more than MOST at most."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def refused(self) -> bool:
        """Whether the request was turned away, in few words."""
        return 400 <= self.status < 500 and len(self.body) < MOST


class Wire:
    """Requests one after another over one connection, which is opened again where the server closed it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname, parts.port)
        self._socket: socket.socket | None = None

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def post(self, path: str, body: bytes, headers: Mapping[str, str] = JSON) -> Reply:
        """Post a body."""
        return self.ask("POST", path, body, headers)

    def ask(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Reply:
        """A request with the headers that belong to it."""
        given = {"host": "test", "content-length": str(len(body)), **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        return self.send([f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body], method)

    def send(self, pieces: Iterable[bytes], method: str = "POST") -> Reply:
        """Send bytes until the server answers or hangs up."""
        began = time.monotonic()
        if self._socket is not None and select.select([self._socket], [], [], 0)[0]:
            self.close()
        if self._socket is None:
            self._socket = socket.create_connection(self._address, HANG)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for piece in pieces:
                if select.select([self._socket], [], [], 0)[0]:
                    break
                self._socket.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may have answered before it hung up
        response = HTTPResponse(self._socket, method=method)
        try:
            response.begin()
            body = response.read(MOST + 1)
        except (HTTPException, ConnectionError):
            self.close()
            return Reply(0, seconds=time.monotonic() - began)
        finally:
            response.close()
        headers = {name.lower(): value for name, value in response.getheaders()}
        if response.will_close or len(body) > MOST:
            self.close()
        return Reply(response.status, body, headers, time.monotonic() - began)


def talk(url: str, pieces: Iterable[bytes], pause: float = 0) -> bytes:
    """Everything that a server says until it hangs up, to bytes that come with pauses in seconds."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), HANG) as wire:
        said = b""
        try:
            for piece in pieces:
                wire.sendall(piece)
                if select.select([wire], [], [], pause)[0]:
                    break
            while piece := wire.recv(MOST):
                said += piece
        except (BrokenPipeError, ConnectionResetError):
            pass
        return said


class Attacked(NamedTuple):
    """A server in a process of its own, a connection to it, and the folder that it may write to."""

    url: str
    wire: Wire
    pid: int
    home: Path

    def post(self, path: str, body: object) -> Reply:
        """Post a JSON value."""
        return self.wire.post(path, json.dumps(body).encode())

    def lives(self) -> bool:
        """Whether the engine lives and a request is answered."""
        return (self.wire.ask("GET", "/health").status, self.post("/v1/completions", COMPLETION).status) == (200, 200)

    def resident(self, peak: bool = False) -> int:
        """Bytes of memory that it holds, or held at most since `forget_peak`."""
        path = Path(f"/proc/{self.pid}/status")
        if not path.exists():
            pytest.skip("needs /proc, to see a process's memory")
        name = "VmHWM:" if peak else "VmRSS:"
        return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name)) * 1024

    def processes(self) -> int:
        """How many processes it has started that still run, and those that they have."""
        parents = {}
        for path in Path("/proc").glob("[0-9]*/status"):
            with suppress(OSError):  # it has just ended
                parents[int(path.parent.name)] = int(path.read_text().partition("PPid:")[2].split()[0])
        family = {self.pid}
        while more := {child for child, parent in parents.items() if parent in family} - family:
            family |= more
        return len(family) - 1

    def forget_peak(self) -> int:
        """Begin the peak anew; returns what is held now."""
        held = self.resident()
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        return held


@contextmanager
def attacked(home: Path, *flags: str) -> Iterator[Attacked]:
    """A server to attack. It has to outlive that."""
    places = {name: str(home) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    arguments = ["serve", str(demo_model()), "--port", "0", "--threads", "1", "--kv-tokens", "4096", *flags]
    with process(arguments, places) as (child, url), Wire(url) as wire:
        yield Attacked(url, wire, child.pid, home)
        assert child.poll() is None, "the server died"


def attack(target: Attacked, cases: Sequence[Case], clients: int = 4) -> list[Reply]:
    """Send all, over a few connections at once; assert what holds for every reply, and that the server is idle then."""
    before = target.resident()
    replies: list[Reply | None] = [None] * len(cases)

    def client(first: int) -> None:
        with Wire(target.url) as wire:
            for place in range(first, len(cases), clients):
                path, body = cases[place]
                replies[place] = (
                    wire.post(path, body) if path else wire.send([body], body.partition(b" ")[0].decode("latin-1"))
                )

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    found = [reply for reply in replies if reply is not None]
    for (path, body), reply in zip(cases, found, strict=True):
        unsupported = reply.status == 501 and (path == "/v1/embeddings" or not path)
        assert reply.status < 500 or reply.status == 503 or unsupported, (path, body[:2000], reply)
        assert len(reply.body) < (MOST if reply.status == 200 else 4096), (path, body[:2000], len(reply.body))
    assert target.lives()
    assert idle(target)
    worst = max(found, key=lambda reply: reply.seconds)
    largest = max(len(reply.body) for reply in found)
    memory = f"{before >> 20} to {target.resident() >> 20} MB"
    print(f"{len(found)} cases, slowest {worst.seconds:.2f} s ({worst.status}), largest {largest} bytes, {memory}")
    return found


def idle(target: Attacked, seconds: float = 20) -> bool:
    """Whether within so many seconds nothing is under way and every page is free."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        text = target.wire.ask("GET", "/metrics").body.decode()
        figures = re.findall(r"^vllm:(?:kv_cache_usage_perc|num_requests_\w+){.*} (.*)$", text, re.MULTILINE)
        if [float(figure) for figure in figures] == [0, 0, 0]:
            return True
        time.sleep(0.05)
    return False


def share(replies: Sequence[Reply], *statuses: int) -> float:
    """Which part of the replies have one of these statuses."""
    return sum(reply.status in statuses for reply in replies) / len(replies)
