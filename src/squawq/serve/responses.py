"""Bytes on the wire: JSON answers, errors in the form of their route, and server-sent events. Speaks plain ASGI."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from starlette.types import Send

from squawq.serve.call import dump, pieces
from squawq.serve.errors import ApiError

EVENTS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a proxy must not hold a stream back
}
KEEP_ALIVE = b":\n\n"
BLOCK = 64 * 1024  # characters that are written at once


async def send_bytes(
    send: Send, status: int, body: bytes, content_type: str, headers: Mapping[str, str] | None = None
) -> None:
    """A whole answer."""
    given = {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}
    await send({"type": "http.response.start", "status": status, "headers": encode(given)})
    await send({"type": "http.response.body", "body": body})


def blocks(value: object) -> list[bytes]:
    """A JSON body in blocks: for a thread beside the event loop, where it is large."""
    found, text = [], ""
    for piece in pieces(value):
        text += piece
        if len(text) > BLOCK:
            found.append(text.encode("utf-8", "replace"))
            text = ""
    return [*found, text.encode("utf-8", "replace")]


async def send_blocks(send: Send, body: list[bytes], headers: Mapping[str, str] | None = None) -> None:
    """A whole answer in JSON, written as its client reads it."""
    length = {"content-type": "application/json", "content-length": str(sum(map(len, body)))}
    await send({"type": "http.response.start", "status": 200, "headers": encode({**length, **(headers or {})})})
    await write(send, body, last=True)


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
    """Events of a stream, in one write where they are short."""
    await write(send, events(payloads), last=last)


def events(payloads: Iterable[str]) -> list[bytes]:
    """Events of a stream as bytes, in blocks."""
    body = "".join(f"data: {payload}\n\n" for payload in payloads).encode("utf-8", "replace")
    return [body[first : first + BLOCK] for first in range(0, len(body), BLOCK)]


async def write(send: Send, body: list[bytes], *, last: bool) -> None:
    """Blocks of an answer, as fast as its client reads them; what was written is let go."""
    body.reverse()
    while body:
        block = body.pop()
        await send({"type": "http.response.body", "body": block, "more_body": bool(body) or not last})
        last = last and bool(body)
    if last:
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def encode(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers as ASGI wants them."""
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
