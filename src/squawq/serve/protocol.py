"""Limits on a connection that no application sees: how many there are, the time until a request's head has arrived,
the time that a client may leave an answer unread. Where there are too many, the one that is idle for the longest time
makes room. On uvicorn's HTTP/1.1 protocol.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from squawq.serve.call import dump
from squawq.serve.errors import ApiError
from squawq.serve.settings import Settings

MAX_SURPLUS = 64  # connections beyond the limit that are still answered
SURPLUS_S = 1.0  # seconds for those to ask


def protocol(settings: Settings) -> type[H11Protocol]:
    """The protocol class for a server with these limits."""
    idle: dict[H11Protocol, None] = {}  # connections with no request under way, the longest idle first

    class Protocol(H11Protocol):
        """One connection. `_clock` runs while a client owes us bytes, `_stall` while it does not read ours."""

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
                    self.connections.discard(oldest)  # its place is free at once, though its loss shows later
                    del idle[oldest]
                    oldest.transport.abort()
            self._surplus = len(self.connections) > settings.connections
            if not self._surplus:
                idle[self] = None
            self._clock = self.loop.call_later(SURPLUS_S if self._surplus else settings.header_timeout, transport.abort)
            if len(self.connections) > settings.connections + MAX_SURPLUS:
                transport.abort()  # not even told why: each is an open file

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
                # The next request came before this one's answer. A connection that is not read shows no hang-up.
                if len(early) > settings.max_header_bytes:
                    self.transport.abort()
                else:
                    self.flow.resume_reading()
            if not (owed and answered):  # a body that is being read is the application's to time
                self._clock = _cancel(self._clock)
            elif self._clock is None and (self.conn.trailing_data[0] or self.conn.their_state is h11.SEND_BODY):
                self._clock = self.loop.call_later(settings.header_timeout, self.transport.abort)

        def on_response_complete(self) -> None:
            if not self.transport.is_closing():
                idle[self] = None
            super().on_response_complete()  # which begins the next request, where that has come
            if not self.cycle.response_complete:
                idle.pop(self, None)

        def send_400_response(self, msg: str) -> None:
            error = sys.exc_info()[1]
            status = getattr(error, "error_status_hint", 400)
            kind = "headers" if status == 431 else "framing"
            self._refuse(ApiError(kind, "the header is too large" if kind == "headers" else msg))

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._stall is None:
                self._stall = self.loop.call_later(settings.write_timeout, self.transport.abort)

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
            """An unread answer may not keep a closing connection open."""
            if self._stall is None:
                self._stall = self.loop.call_later(settings.write_timeout, self.transport.abort)

        def _refuse(self, error: ApiError) -> None:
            """Answer without the application, and close."""
            if self.transport.is_closing():
                return
            status = error.status(settings.tgi)
            body = dump(error.body(settings.tgi, own=False)).encode()
            head = [f"HTTP/1.1 {status} {error.name}", "content-type: application/json", f"content-length: {len(body)}"]
            head += ["connection: close", *(f"{k}: {v}" for k, v in error.headers.items() if k != "Connection")]
            self.transport.write("\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body)
            self.transport.close()
            self._abort_later()

    return Protocol


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Nothing, in the place of the timer."""
    if timer is not None:
        timer.cancel()
    return None
