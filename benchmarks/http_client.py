"""A light client for the server's benchmarks: sends streaming requests together and reports when their tokens came.

A job, a line of JSON on stdin, is {"port": 8000, "path": "/v1/completions", "bodies": [...]}; an answer, a line on
stdout, is {"seconds": to the last byte, "first": [to each first event], "events": how many}, from when all were sent.
It runs in a process of its own, so that the server does not wait for its Python.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any


async def send(port: int, path: str, body: Any, start: asyncio.Barrier) -> tuple[float, float, int]:
    """Seconds to the first event and to the last byte, counted from the start, and how many events there were."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    data = f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text
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


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(asyncio.run(run(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
