"""Bytes on the wire: JSON answers, errors in the form of their route, and server-sent events. Speaks plain ASGI."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from starlette.types import Send

from squawq.serve.call import dump
from squawq.serve.errors import ApiError

EVENTS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a proxy must not hold a stream back
}
KEEP_ALIVE = b":\n\n"


async def send_bytes(
    send: Send, status: int, body: bytes, content_type: str, headers: Mapping[str, str] | None = None
) -> None:
    """A whole answer."""
    given = {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}
    await send({"type": "http.response.start", "status": status, "headers": encode(given)})
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
    """A whole answer in JSON."""
    await send_bytes(send, status, dump(value).encode("utf-8", "replace"), "application/json", headers)


async def send_error(send: Send, error: ApiError, tgi: bool, *, own: bool) -> None:
    """An error in the form that its route's clients read."""
    status = error.status(tgi or own)
    await send_json(send, error.body(tgi or own, own), status, error.headers)


async def start_events(send: Send, headers: Mapping[str, str] | None = None) -> None:
    """The head of a stream."""
    await send({"type": "http.response.start", "status": 200, "headers": encode({**EVENTS, **(headers or {})})})


async def send_events(send: Send, payloads: Iterable[str], *, last: bool = False) -> None:
    """Events of a stream, in one write."""
    body = "".join(f"data: {payload}\n\n" for payload in payloads).encode("utf-8", "replace")
    if body or last:
        await send({"type": "http.response.body", "body": body, "more_body": not last})


def encode(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers as ASGI wants them."""
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
