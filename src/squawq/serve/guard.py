"""What stands before every route: the API key, the form of a request's head, its id, its log line and its count.

Access is refused unless the route is one of PUBLIC; paths are compared as they came, never by what a Host header says.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from squawq.serve.errors import ApiError
from squawq.serve.logs import event
from squawq.serve.metrics import Metrics
from squawq.serve.responses import send_error
from squawq.serve.settings import Settings

logger = logging.getLogger("squawq.serve")
PUBLIC = frozenset(
    (method, path) for method in ("GET", "HEAD") for path in ("/", "/health", "/livez", "/readyz", "/ping")
)
_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Guard:
    """ASGI middleware. `routes` are the paths that are counted by name."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, own: Collection[str]) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._own = frozenset(own)
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
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
                await send_error(answer, refusal, self._settings.tgi, own=path in self._own)
            else:
                await self._app(scope, receive, answer)
        finally:
            self._metrics.http(scope.get("route_template", path), method, status)
            fields = {"id": scope["request_id"], "method": method, "path": path, "status": status}
            seconds = round(time.perf_counter() - began, 4)
            level = logging.DEBUG if (method, path) in PUBLIC or path == "/metrics" else logging.INFO
            keyless = bool(refusal) or not self._keys  # nobody was asked for a key, or none was given
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
        equal = [hmac.compare_digest(digest, known) for known in self._keys]  # all of them, in constant time
        if scheme.lower() == b"bearer" and any(equal):
            scope["tenant"] = digest.hex()  # whose turn it takes in the engine, and whose prefix cache it reads
            return None
        return ApiError("unauthorized", "Unauthorized: send the header Authorization: Bearer KEY")


def _ambiguous(scope: Scope) -> bool:
    """Whether a proxy may see another end of the request than h11 does, which reads every version alike and lets a
    Transfer-Encoding win over a Content-Length: what follows could be a request of its own (RFC 9112, 6.1 and 11.2)."""
    version, names = scope["http_version"], [name for name, _ in scope["headers"]]
    old_or_both = version != "1.1" or b"content-length" in names
    return version not in ("1.0", "1.1") or (b"transfer-encoding" in names and old_or_both)
