"""HTTP: limits on connections, checks before every route (API key, headers, framing), replies, errors and events."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import sys
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Generic, TypeVar

import h11
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from squawq.serve.errors import ApiError
from squawq.serve.logs import event
from squawq.serve.metrics import Metrics
from squawq.serve.settings import ServerSettings

logger = logging.getLogger("squawq.serve")
Item = TypeVar("Item")
MIN_LOGPROB = -9999.0  # JSON has no minus infinity
# Line ends of str.splitlines but not of server-sent events: some clients would break a line at them.
_LINE_ENDS = {mark: f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}
_ROWS = 64  # of a LazyList, encoded at a time: json holds the GIL meanwhile
_ITEMS = 4096  # of a plain list


class LazyList(Generic[Item]):
    """A JSON array whose rows are made while they are encoded, so that a long one is never in memory."""

    def __init__(self, make: Callable[[Item], object], items: Sequence[Item]) -> None:
        self._make, self._items = make, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, part: slice) -> list[object]:
        return [self._make(item) for item in self._items[part]]


def dump(value: object) -> str:
    """Compact JSON on one line, without ASCII escapes. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_rows)
    if not text.isascii():
        for mark, escape in _LINE_ENDS.items():
            text = text.replace(mark, escape)
    return text


def pieces(value: object) -> Iterator[str]:
    """`dump` in small pieces, so that other threads can take the GIL in between."""
    if isinstance(value, dict) and any(isinstance(item, dict | list | LazyList) for item in value.values()):
        begin = "{"
        for key, item in value.items():
            yield f"{begin}{dump(key)}:"
            yield from pieces(item)
            begin = ","
        yield "}"
    elif isinstance(value, list) and len(value) <= _ITEMS and any(isinstance(item, dict | LazyList) for item in value):
        begin = "["
        for item in value:
            yield begin
            yield from pieces(item)
            begin = ","
        yield "]"
    elif isinstance(value, list | LazyList) and len(value):
        begin, step = "[", _ROWS if isinstance(value, LazyList) else _ITEMS
        for first in range(0, len(value), step):
            yield begin + dump(value[first : first + step])[1:-1]
            begin = ","
        yield "]"
    else:
        yield dump(value)


def _rows(value: object) -> list[object]:
    if isinstance(value, LazyList):
        return value[:]
    raise TypeError(f"{type(value).__name__} is no JSON value")


def finite_logprob(logprob: float) -> float:
    """A log probability that JSON can represent: at least MIN_LOGPROB."""
    return max(logprob, MIN_LOGPROB)


EVENT_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a proxy must not buffer a stream
}
KEEP_ALIVE = b":\n\n"
BLOCK = 64 * 1024  # bytes or characters that are written at once


class JsonReply(JSONResponse):
    """A JSON response, as `dump` writes it."""

    def render(self, content: object) -> bytes:
        return dump(content).encode("utf-8", "replace")


class HeldReply(StreamingResponse):
    """A streaming response that releases `resources` once it is written, or its client has disconnected."""

    def __init__(self, body: AsyncIterable[bytes], headers: Mapping[str, str]) -> None:
        super().__init__(body, headers=headers)
        self.resources = AsyncExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.resources:
            await super().__call__(scope, receive, send)


def error_reply(error: ApiError, tgi: bool, *, tgi_route: bool) -> Response:
    """An error in TGI's form if the server's API is TGI's (`tgi`) or only TGI has the route, else in OpenAI's."""
    return JsonReply(error.body(tgi or tgi_route, tgi_route), error.status(tgi or tgi_route), error.headers)


def json_reply(body: list[bytes], headers: Mapping[str, str] | None = None) -> HeldReply:
    """A JSON response of encoded blocks (see `blocks`)."""
    length = str(sum(map(len, body)))
    return HeldReply(drain(body), {"content-type": "application/json", "content-length": length, **(headers or {})})


async def drain(body: list[bytes]) -> AsyncIterator[bytes]:
    """Yield the blocks, which starlette writes as fast as the client reads. Frees each one then: `body` is emptied."""
    body.reverse()
    while body:
        yield body.pop()


def blocks(value: object) -> list[bytes]:
    """A JSON body in blocks. Large bodies take seconds: call it in a worker thread."""
    found, text = [], ""
    for piece in pieces(value):
        text += piece
        if len(text) > BLOCK:
            found.append(text.encode("utf-8", "replace"))
            text = ""
    return [*found, text.encode("utf-8", "replace")]


def events(payloads: Iterable[object], *, large: bool = False) -> list[bytes]:
    """Server-sent events in blocks: JSON values, and texts as they are. large: call this in a worker thread."""
    texts = (item if isinstance(item, str) else "".join(pieces(item)) if large else dump(item) for item in payloads)
    body = "".join(f"data: {text}\n\n" for text in texts).encode("utf-8", "replace")
    return [body[first : first + BLOCK] for first in range(0, len(body), BLOCK)]


PUBLIC = frozenset(  # routes without an API key
    (method, path) for method in ("GET", "HEAD") for path in ("/", "/health", "/livez", "/readyz", "/ping")
)
_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Guard:
    """ASGI middleware before every route: API key, limits and framing of the headers, request id, log line, metrics.

    Every route but PUBLIC and the web files needs a key. Paths are compared as received; the Host header has no effect.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        metrics: Metrics,
        tgi_paths: Collection[str],
        web_files: Collection[str],
    ) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._tgi_paths = frozenset(tgi_paths)
        self._public = PUBLIC | {(method, path) for method in ("GET", "HEAD") for path in web_files}
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        request_id = next((v for k, v in scope["headers"] if k == b"x-request-id" and _ID.fullmatch(v)), None)
        request_id = request_id or uuid.uuid4().hex.encode()
        scope["request_id"] = request_id.decode()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id)]}
            await send(message)

        path, method = scope["path"], scope["method"]
        refusal = self._refusal(scope)
        try:
            if refusal:
                reply = error_reply(refusal, self._settings.tgi, tgi_route=path in self._tgi_paths)
                await reply(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
        finally:
            self._metrics.http(scope.get("route_template", path), method, status)
            fields = {"id": scope["request_id"], "method": method, "path": path, "status": status}
            seconds = round(time.perf_counter() - began, 4)
            level = logging.DEBUG if (method, path) in self._public or path == "/metrics" else logging.INFO
            keyless = bool(refusal) or not self._keys  # sent without a valid key
            event(logger, level, "http", **fields, seconds=seconds, limited=keyless and status >= 400)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers, settings = scope["headers"], self._settings
        if len(headers) > settings.max_headers:
            return ApiError("headers", f"the request has more than {settings.max_headers} headers")
        if sum(len(name) + len(value) for name, value in headers) > settings.max_header_bytes:
            return ApiError("headers", f"the headers have more than {settings.max_header_bytes} bytes")
        if _ambiguous(scope):
            return ApiError("framing", "send HTTP/1.1, with a Content-Length or a Transfer-Encoding, not both")
        if not self._keys or (scope["method"], scope["path"]) in self._public:
            return None
        given = [value for key, value in headers if key == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(key.strip()).digest()
        equal = [hmac.compare_digest(digest, known) for known in self._keys]  # compare with all keys, in constant time
        if scheme.lower() == b"bearer" and any(equal):
            scope["tenant"] = digest.hex()  # for fair scheduling and a prefix cache of its own
            return None
        return ApiError("unauthorized", "Unauthorized: send the header Authorization: Bearer KEY")


def _ambiguous(scope: Scope) -> bool:
    """Whether a proxy may see the request end elsewhere than h11 does (request smuggling; RFC 9112, 6.1 and 11.2).

    h11 reads all HTTP versions alike, and prefers Transfer-Encoding to Content-Length.
    """
    version, names = scope["http_version"], [name for name, _ in scope["headers"]]
    old_or_both = version != "1.1" or b"content-length" in names
    return version not in ("1.0", "1.1") or (b"transfer-encoding" in names and old_or_both)


MAX_SURPLUS = 64  # connections above the limit that get an error instead of an abort
SURPLUS_S = 1.0  # seconds for those to send a request


def http_protocol(settings: ServerSettings) -> type[H11Protocol]:
    """uvicorn's protocol class with these limits.

    Above the limit of connections, the one that has been idle longest is closed."""
    idle: dict[H11Protocol, None] = {}  # connections without a running request, the longest idle first

    class Connection(H11Protocol):
        """One connection. Timers abort it: `_clock` if the client sends no request, `_stall` if it does not read."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._clock: asyncio.TimerHandle | None = None
            self._stall: asyncio.TimerHandle | None = None
            self._surplus = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > settings.connections:
                oldest = next((one for one in idle if not one.transport.get_write_buffer_size()), None)
                if oldest is not None:  # an answer that is still being written is not cut off
                    self.connections.discard(oldest)  # frees its place now; connection_lost comes later
                    del idle[oldest]
                    oldest.transport.abort()
            self._surplus = len(self.connections) > settings.connections
            if not self._surplus:
                idle[self] = None
            self._clock = self.loop.call_later(SURPLUS_S if self._surplus else settings.header_timeout, transport.abort)
            if len(self.connections) > settings.connections + MAX_SURPLUS:
                transport.abort()  # without an error: each connection is an open file

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            idle.pop(self, None)
            self._clock = _cancel(self._clock)
            self._stall = _cancel(self._stall)

        def data_received(self, data: bytes) -> None:
            if self._surplus:
                self._refuse(ApiError("unavailable", f"{settings.connections} connections are open; try later"))
                return
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                idle.pop(self, None)
            owed = self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing()
            answered = self.cycle is None or self.cycle.response_complete
            if not answered and (early := self.conn.trailing_data[0]):
                # The next request came before this one's answer. Read on: a paused one does not report a disconnect.
                if len(early) > settings.max_header_bytes:
                    self.transport.abort()
                else:
                    self.flow.resume_reading()
            if not (owed and answered):  # the application times a body that it reads
                self._clock = _cancel(self._clock)
            elif self._clock is None and (self.conn.trailing_data[0] or self.conn.their_state is h11.SEND_BODY):
                self._clock = self.loop.call_later(settings.header_timeout, self.transport.abort)

        def on_response_complete(self) -> None:
            if not self.transport.is_closing():
                idle[self] = None
            super().on_response_complete()  # this starts the next request if it is here already
            if not self.cycle.response_complete:
                idle.pop(self, None)

        def send_400_response(self, msg: str) -> None:
            error = sys.exc_info()[1]
            status = getattr(error, "error_status_hint", 400)
            kind = "headers" if status == 431 else "framing"
            self._refuse(ApiError(kind, "the header is too large" if kind == "headers" else msg))

        def pause_writing(self) -> None:
            super().pause_writing()
            self._abort_later()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stall = _cancel(self._stall)

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._abort_later()

        def shutdown(self) -> None:
            super().shutdown()
            if self.transport.is_closing():
                self._abort_later()

        def _abort_later(self) -> None:
            """Abort a connection whose client does not read its answer."""
            if self._stall is None:
                self._stall = self.loop.call_later(settings.write_timeout, self.transport.abort)

        def _refuse(self, error: ApiError) -> None:
            """Send an error without calling the application, and close."""
            if self.transport.is_closing():
                return
            status = error.status(settings.tgi)
            body = dump(error.body(settings.tgi, tgi_route=False)).encode()
            head = [f"HTTP/1.1 {status} {error.name}", "content-type: application/json", f"content-length: {len(body)}"]
            head += ["connection: close", *(f"{k}: {v}" for k, v in error.headers.items() if k != "Connection")]
            self.transport.write("\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body)
            self.transport.close()
            self._abort_later()

    return Connection


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer. Returns None, its new value."""
    if timer is not None:
        timer.cancel()
    return None
