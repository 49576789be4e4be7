"""Reads request bodies within limits of size, time, rate and memory. Small bodies are never refused for others' sake;
where large ones fill their memory, the slowest of them goes first. Speaks plain ASGI; knows no JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.types import Receive, Scope

from squawq.serve.errors import ApiError
from squawq.serve.settings import Settings

SMALL = 64 * 1024  # bytes: bodies up to it count against nothing but their own time
MAX_LARGE = 64  # large bodies of the largest size that may be arriving at once
WINDOW = 5.0  # seconds over which a large body's rate is looked at


class Bodies:
    """The bodies that are arriving. For the event loop alone."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._large: set[_Upload] = set()
        self._held = 0  # bytes of large bodies that are not whole yet

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """A request's body. Raises ApiError."""
        _check(dict(scope["headers"]), self._settings.max_body_bytes)
        upload = _Upload(self._settings)
        try:
            async with upload.timeout:
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError("slow", "the client hung up")
                    self._add(upload, message.get("body", b""))
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise ApiError("slow", upload.late) from error
        finally:
            self._forget(upload)
        return bytes(upload.body)

    def _add(self, upload: _Upload, piece: bytes) -> None:
        """Take the next piece; where that is too much for all together, end the slowest."""
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
    """A body as it comes. `timeout` ends it when it is late: as a whole, or a large one for its rate."""

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
        """Add a piece, and begin the next window where this one has its bytes."""
        self.body += piece
        self._count += len(piece)
        if len(self.body) <= SMALL or self._count < self._least:
            return
        self._before = self._began, self._count
        self._began, self._count = self._clock(), 0
        if self._began + WINDOW < self._last:
            self._end_at(self._began + WINDOW, f"less than {self._least:g} bytes of the body came within {WINDOW:g} s")

    def rate(self) -> float:
        """Bytes a second lately."""
        began, count = self._before
        return (count + self._count) / max(self._clock() - began, 0.1)

    def end(self, why: str) -> None:
        """Have the reader stop now, with this reason."""
        self._end_at(self._clock(), why)

    def _end_at(self, when: float, why: str) -> None:
        if not self.timeout.expired():
            self.late = why
            self.timeout.reschedule(when)


def _check(headers: Mapping[bytes, bytes], limit: int) -> None:
    """Raise ApiError for a body that its head shows to be no JSON or too large."""
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise ApiError("media_type", "send JSON, with the header Content-Type: application/json")
    length = headers.get(b"content-length", b"0")
    if len(length) > 18 or int(length) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> ApiError:
    return ApiError("too_large", f"the body has more than {limit} bytes")
