"""HTTP: the checks before every route (API key, headers, framing), request bodies within their limits, replies, errors
and server-sent events on the wire.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Collection, Iterable, Mapping
from contextlib import AsyncExitStack

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from squawq.serve.call import dump, pieces
from squawq.serve.errors import ApiError
from squawq.serve.logs import event
from squawq.serve.metrics import Metrics
from squawq.serve.settings import Settings

logger = logging.getLogger("squawq.serve")
SMALL = 64 * 1024  # bytes: bodies up to this size only have a timeout
MAX_LARGE = 64  # memory for arriving large bodies, in bodies of the largest size
WINDOW = 5.0  # seconds over which a large body's rate is measured


class Bodies:
    """Reads request bodies within limits of size, time, rate and memory; for the event loop only.

    Small bodies are never refused because of others. Where large bodies fill their memory, the slowest is ended."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._large: set[_Upload] = set()
        self._held = 0  # bytes of large bodies that are still arriving

    async def read(self, request: Request) -> bytes:
        """A request's body. Raises ApiError."""
        _check(request.headers, self._settings.max_body_bytes)
        upload = _Upload(self._settings)
        try:
            async with upload.timeout:
                async for piece in request.stream():
                    self._add(upload, piece)
        except ClientDisconnect as error:
            raise ApiError("slow", "the client hung up") from error
        except TimeoutError as error:
            raise ApiError("slow", upload.late) from error
        finally:
            self._forget(upload)
        return bytes(upload.body)

    def _add(self, upload: _Upload, piece: bytes) -> None:
        """Add a piece. If large bodies exceed their memory, end the slowest."""
        upload.take(piece)
        if len(upload.body) > self._settings.max_body_bytes:
            raise _too_large(self._settings.max_body_bytes)
        if upload in self._large:
            self._held += len(piece)
        elif len(upload.body) > SMALL:
            self._large.add(upload)
            self._held += len(upload.body)
        while self._held > MAX_LARGE * self._settings.max_body_bytes:
            slowest = min(self._large, key=_Upload.rate)
            self._forget(slowest)
            slowest.end("too many large bodies are arriving, and this one came most slowly")

    def _forget(self, upload: _Upload) -> None:
        if upload in self._large:
            self._large.discard(upload)
            self._held -= len(upload.body)


class _Upload:
    """A body while it arrives. `timeout` expires if the body, or a window of a large one, is late."""

    def __init__(self, settings: Settings) -> None:
        self.body = bytearray()
        self.late = f"the body did not arrive within {settings.body_timeout:g} s"
        self.timeout = asyncio.timeout(settings.body_timeout)
        self._clock = asyncio.get_running_loop().time
        self._last = self._clock() + settings.body_timeout
        self._least = settings.min_body_rate * WINDOW  # bytes in a window
        self._began, self._count = self._clock(), 0  # the window, and its bytes
        self._before = self._began, 0  # the window before

    def take(self, piece: bytes) -> None:
        """Add a piece. Start the next window if this one has enough bytes."""
        self.body += piece
        self._count += len(piece)
        if len(self.body) <= SMALL or self._count < self._least:
            return
        self._before = self._began, self._count
        self._began, self._count = self._clock(), 0
        if self._began + WINDOW < self._last:
            self._end_at(self._began + WINDOW, f"less than {self._least:g} bytes of the body came within {WINDOW:g} s")

    def rate(self) -> float:
        """Recent bytes per second."""
        began, count = self._before
        return (count + self._count) / max(self._clock() - began, 0.1)

    def end(self, why: str) -> None:
        """End the upload now, for this reason."""
        self._end_at(self._clock(), why)

    def _end_at(self, when: float, why: str) -> None:
        if not self.timeout.expired():
            self.late = why
            self.timeout.reschedule(when)


def _check(headers: Headers, limit: int) -> None:
    """Raise ApiError if the headers say that the body is not JSON or too large."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError("media_type", "send JSON, with the header Content-Type: application/json")
    length = headers.get("content-length", "0")
    if len(length) > 18 or int(length) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> ApiError:
    return ApiError("too_large", f"the body has more than {limit} bytes")


EVENT_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a proxy must not buffer a stream
}
KEEP_ALIVE = b":\n\n"
BLOCK = 64 * 1024  # characters that are written at once


class JsonReply(JSONResponse):
    """A JSON response, as `call.dump` writes it."""

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
    """An error in the form that the clients of its route read."""
    return JsonReply(error.body(tgi or tgi_route, tgi_route), error.status(tgi or tgi_route), error.headers)


def json_reply(body: list[bytes], headers: Mapping[str, str] | None = None) -> HeldReply:
    """A JSON response from the `blocks` of its body."""
    length = str(sum(map(len, body)))
    return HeldReply(drain(body), {"content-type": "application/json", "content-length": length, **(headers or {})})


async def drain(body: list[bytes]) -> AsyncIterator[bytes]:
    """Blocks as fast as the client reads them. Each is released once it is written."""
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


def events(payloads: Iterable[str]) -> list[bytes]:
    """Server-sent events as bytes, in blocks."""
    body = "".join(f"data: {payload}\n\n" for payload in payloads).encode("utf-8", "replace")
    return [body[first : first + BLOCK] for first in range(0, len(body), BLOCK)]


PUBLIC = frozenset(
    (method, path) for method in ("GET", "HEAD") for path in ("/", "/health", "/livez", "/readyz", "/ping")
)
_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Guard:
    """ASGI middleware before every route: API key, limits and form of the head, request id, log line, metrics.

    Every route but PUBLIC needs a key. Paths are compared as they came, whatever the Host header says."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, tgi_paths: Collection[str]) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._tgi_paths = frozenset(tgi_paths)
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        name = next((v for k, v in scope["headers"] if k == b"x-request-id" and _ID.fullmatch(v)), None)
        name = name or uuid.uuid4().hex.encode()
        scope["request_id"] = name.decode()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", name)]}
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
            level = logging.DEBUG if (method, path) in PUBLIC or path == "/metrics" else logging.INFO
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
        if not self._keys or (scope["method"], scope["path"]) in PUBLIC:
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
    """Whether a proxy may see another end of the request than h11 (request smuggling; RFC 9112, 6.1 and 11.2).

    h11 reads every version alike, and prefers Transfer-Encoding to Content-Length.
    """
    version, names = scope["http_version"], [name for name, _ in scope["headers"]]
    old_or_both = version != "1.1" or b"content-length" in names
    return version not in ("1.0", "1.1") or (b"transfer-encoding" in names and old_or_both)
