"""Where the server listens: sockets, their URLs, and what to say of an address that cannot be had. Knows no HTTP."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from squawq.errors import ConfigError
from squawq.serve.settings import Settings

REASONS = {
    errno.EADDRINUSE: "another program listens there; choose another port (0 takes a free one), or end that program",
    errno.EACCES: "this user may not listen there; choose a port above 1023",
    errno.EADDRNOTAVAIL: "this machine has no such address; use one of its own, or 0.0.0.0 for all",
}


def bind(settings: Settings) -> list[socket.socket] | None:
    """Sockets on the server's port and the one for metrics, not listening yet: a port that cannot be had shows before a
    model is loaded. None for a Unix socket. Raises ConfigError."""
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
    """A socket for each address of a host; of several, the first alone has to be there."""
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
    """What to say of an address that cannot be had."""
    reason = REASONS.get(error.errno or 0, os.strerror(error.errno) if error.errno else str(error))
    return ConfigError(f"cannot listen on {_place(host, port)}: {reason}")


def uds_refusal(path: Path, error: OSError) -> ConfigError:
    """The same for a Unix socket."""
    return ConfigError(f"cannot listen on the Unix socket {path}: {error.strerror or error}")


def url(settings: Settings, port: int) -> str:
    """Where clients find the server."""
    if settings.uds is not None:
        return str(settings.uds)
    return f"{'https' if settings.ssl_certfile else 'http'}://{_place(settings.host, port)}"


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_open(settings: Settings) -> bool:
    """Whether other machines may reach the server, and anybody there may use it."""
    if settings.api_keys or settings.uds is not None:
        return False
    try:
        return not ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        return settings.host != "localhost"
