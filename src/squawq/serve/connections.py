"""Sockets and connections: where the server listens, how many connections there are, and the time limits of each."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from squawq.errors import ConfigError
from squawq.serve.call import dump
from squawq.serve.errors import ApiError
from squawq.serve.settings import Settings

REASONS = {
    errno.EADDRINUSE: "another program listens there; choose another port (0 takes a free one), or end that program",
    errno.EACCES: "this user may not listen there; choose a port above 1023",
    errno.EADDRNOTAVAIL: "this machine has no such address; use one of its own, or 0.0.0.0 for all",
}


def bind(settings: Settings) -> list[socket.socket] | None:
    """Bind sockets to the server's port and the metrics port, before the model is loaded. None for a Unix socket.

    Raises ConfigError."""
    if settings.uds is not None:
        return None
    sockets: list[socket.socket] = []
    try:
        sockets += _bind(settings.host, settings.port)
        if settings.prometheus_port is not None:
            sockets += _bind(settings.host, settings.prometheus_port)
    except BaseException:
        for one in sockets:
            one.close()
        raise
    return sockets


def _bind(host: str, port: int) -> list[socket.socket]:
    """Bind a socket to each address of a host. Only the first must succeed."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host is {host!r}, which is no address of this machine: {error}") from error
    sockets: list[socket.socket] = []
    for family, kind, protocol, _, address in dict.fromkeys(found):
        if sockets:  # the same port, where any free one was asked for
            address = (address[0], sockets[0].getsockname()[1], *address[2:])
        try:
            sockets.append(_socket(family, kind, protocol, address))
        except OSError as error:
            if not sockets:
                raise refusal(host, port, error) from error
    return sockets


def _socket(family: int, kind: int, protocol: int, address: Sequence[object]) -> socket.socket:
    one = socket.socket(family, kind, protocol)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(tuple(address))
    except BaseException:
        one.close()
        raise
    return one


def refusal(host: str, port: int, error: OSError) -> ConfigError:
    """The error for an address that cannot be bound."""
    reason = REASONS.get(error.errno or 0, os.strerror(error.errno) if error.errno else str(error))
    return ConfigError(f"cannot listen on {_place(host, port)}: {reason}")


def uds_refusal(path: Path, error: OSError) -> ConfigError:
    """The error for a Unix socket that cannot be bound."""
    return ConfigError(f"cannot listen on the Unix socket {path}: {error.strerror or error}")


def url(settings: Settings, port: int) -> str:
    """The server's URL."""
    if settings.uds is not None:
        return str(settings.uds)
    return f"{'https' if settings.ssl_certfile else 'http'}://{_place(settings.host, port)}"


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_open(settings: Settings) -> bool:
    """Whether other machines can reach the server, and need no API key."""
    if settings.api_keys or settings.uds is not None:
        return False
    try:
        return not ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        return settings.host != "localhost"


MAX_SURPLUS = 64  # connections beyond the limit that are still answered
SURPLUS_S = 1.0  # seconds for those to ask


def protocol(settings: Settings) -> type[H11Protocol]:
    """uvicorn's protocol class with these limits.

    Above the limit of connections, the one that has been idle longest is closed."""
    idle: dict[H11Protocol, None] = {}  # connections with no request under way, the longest idle first

    class Protocol(H11Protocol):
        """One connection. `_clock` runs while the client owes us bytes, `_stall` while it does not read ours."""

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
            """Abort a closing connection whose client does not read its answer."""
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

    return Protocol


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer. Returns None, its new value."""
    if timer is not None:
        timer.cancel()
    return None
