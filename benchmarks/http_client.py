"""A light HTTP client for the server benchmarks: requests as bytes, whole responses and streams decoded.

As a program, it sends streaming requests together and reports when their tokens arrived. It runs in its own process, so
that the server does not wait for the client's Python. A job is a line of JSON on stdin: {"port": 8000, "path":
"/v1/completions", "bodies": [...]}. The answer is a line on stdout: {"seconds": until the last byte, "first": [until
each stream's first event], "events": their number}, all measured from when the requests were sent.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

HOST = "127.0.0.1"


def encode(path: str, body: Any, kind: str = "application/json", method: str = "POST") -> bytes:
    """Encode a request whose connection closes after the response. body: a JSON value, or bytes sent unchanged."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: int
    body: bytes

    @property
    def streamed(self) -> bool:
        """Whether it is an event stream."""
        return self.body.startswith((b"data: ", b":"))

    @property
    def ended(self) -> bool:
        """Whether it is a stream with OpenAI's end mark."""
        return self.body.endswith(b"data: [DONE]\n\n")

    def values(self) -> list[Any]:
        """Its JSON values: one, or those of a stream without the end mark. Raises ValueError for anything else."""
        if not self.streamed:
            return [json.loads(self.body)]
        events = [event for event in self.body.decode().split("\n\n") if event.startswith("data: ")]
        return [json.loads(event[6:]) for event in events if event != "data: [DONE]"]


def decode(data: bytes) -> Answer:
    """Decode a response from its bytes. Raises ValueError for a truncated one."""
    head, mark, body = data.partition(b"\r\n\r\n")
    if not mark:
        raise ValueError(f"the answer's head was cut off after {len(data)} bytes")
    lines = head.lower().split(b"\r\n")
    fields = dict(line.split(b": ", 1) for line in lines[1:])
    if fields.get(b"transfer-encoding") == b"chunked":
        body = _joined(body)
    elif int(fields.get(b"content-length", len(body))) != len(body):
        raise ValueError(f"the answer's body was cut off after {len(body)} bytes")
    return Answer(int(lines[0].split()[1]), body)


def _joined(chunked: bytes) -> bytes:
    body = b""
    while True:
        size, _, chunked = chunked.partition(b"\r\n")
        if not size or len(chunked) < int(size, 16) + 2:
            raise ValueError(f"the answer was cut off after {len(body)} bytes")
        if not int(size, 16):
            return body
        body, chunked = body + chunked[: int(size, 16)], chunked[int(size, 16) + 2 :]


async def ask(port: int, request: bytes) -> Answer:
    """Send a request and read its answer. Raises OSError, and ValueError for an answer that was cut off."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(request)
        return decode(await reader.read())
    finally:
        writer.close()


async def send(port: int, path: str, body: Any, start: asyncio.Barrier) -> tuple[float, float, int]:
    """Seconds to the first event and to the last byte, counted from the start, and how many events there were."""
    reader, writer = await asyncio.open_connection(HOST, port)
    data = encode(path, body)
    await start.wait()
    began = time.perf_counter()
    writer.write(data)
    first, events = 0.0, 0
    while piece := await reader.read(65536):
        if found := piece.count(b"data: "):
            first = first or time.perf_counter() - began
            events += found
    writer.close()
    return first, time.perf_counter() - began, events


async def run(job: dict[str, Any]) -> dict[str, Any]:
    """All requests of a job at once."""
    start = asyncio.Barrier(len(job["bodies"]))
    found = await asyncio.gather(*(send(job["port"], job["path"], body, start) for body in job["bodies"]))
    first, last, events = zip(*found, strict=True)
    return {"seconds": max(last), "first": first, "events": sum(events)}


class Client:
    """This program in a process of its own, beside a server on this port."""

    def __init__(self, port: int) -> None:
        command = [sys.executable, __file__]
        self._port = port
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, bodies: Sequence[Any]) -> dict[str, Any]:
        """The answer for these requests, to /v1/completions."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"port": self._port, "path": "/v1/completions", "bodies": bodies}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=10)


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(asyncio.run(run(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
