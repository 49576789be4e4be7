"""Runs the server: listen, load the model, shut down. The first signal drains, the second aborts.

Every request in flight then gets a finish reason, and the exit code is 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import os
import platform
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from squawq import __version__
from squawq.errors import ConfigError
from squawq.hub.download import resolve
from squawq.progress import console
from squawq.serve import logs
from squawq.serve.app import Api
from squawq.serve.http import http_protocol
from squawq.serve.model import Served
from squawq.serve.settings import ServerSettings
from squawq.serve.welcome import welcome

logger = logging.getLogger("squawq.serve")
TICK = 0.05
LAST_WORDS = 1.0  # seconds for answers to be written after their requests were aborted
REASONS = {
    errno.EADDRINUSE: "another program listens there; choose another port (0 takes a free one), or end that program",
    errno.EACCES: "this user may not listen there; choose a port above 1023",
    errno.EADDRNOTAVAIL: "this machine has no such address; use one of its own, or 0.0.0.0 for all",
}


class Server(uvicorn.Server):
    """uvicorn's server with our shutdown. `stop` works from any thread, as a signal does."""

    def __init__(self, api: Api) -> None:
        settings = api.settings
        super().__init__(
            uvicorn.Config(
                api.app(),
                host=settings.host,
                port=settings.port,
                uds=None if settings.uds is None else str(settings.uds),
                http=http_protocol(settings),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=2048,
                timeout_keep_alive=settings.idle_timeout,  # type: ignore[arg-type]  # any number does
                timeout_graceful_shutdown=1,
                h11_max_incomplete_event_size=settings.max_header_bytes,
                ssl_keyfile=None if settings.ssl_keyfile is None else str(settings.ssl_keyfile),
                ssl_certfile=None if settings.ssl_certfile is None else str(settings.ssl_certfile),
            )
        )
        self.api = api
        self.stops = 0
        self.failed = False

    @property
    def bound_port(self) -> int:
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port

    def stop(self) -> None:
        """Shut down: the first call drains, the second aborts."""
        self.stops += 1

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals without raising them again at the end, so that a graceful shutdown exits with 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and log the URL. Raises ConfigError if it cannot listen."""
        settings, served = self.api.settings, self.api.served
        try:
            await super().startup(sockets)
        except OSError as error:  # somebody else was quicker
            if settings.uds is not None:
                raise ConfigError(
                    f"cannot listen on the Unix socket {settings.uds}: {error.strerror or error}"
                ) from error
            raise _refusal(settings.host, settings.port, error) from error
        if not self.started:
            return
        if is_open(settings):
            text = "there is no API key: whoever reaches this machine may use the model; give --api-key"
            logs.event(logger, logging.WARNING, text, host=settings.host)
        at = url(settings, 0 if settings.uds else self.bound_port)
        logs.event(
            logger, logging.INFO, "serving", model=served.name, at=at, context=served.max_len, **served.device_info()
        )
        if settings.log_format == "text" and console.is_terminal:
            logs.lines(logger, welcome(served, at))

    async def main_loop(self) -> None:
        """Serve until `stop`, then drain; or until the model cannot run any more."""
        count, engine = 0, self.api.served.engine
        while not self.stops and engine.failure is None:
            await self.on_tick(count)
            count += 2  # uvicorn's ticks are twice as long
            await asyncio.sleep(TICK)
        settings, generation = self.api.settings, self.api.runtime
        if engine.failure is not None:
            self.failed = True
            logs.event(logger, logging.ERROR, "ending: the model cannot run any more", why=engine.failure)
        generation.draining = True
        patience = LAST_WORDS if self.failed else settings.shutdown_timeout
        logs.event(logger, logging.INFO, "draining", requests=generation.in_flight, seconds=patience)
        await self._until_idle(time.monotonic() + patience, stops=2)
        if generation.in_flight:
            logs.event(logger, logging.INFO, "aborting", requests=generation.in_flight)
        threading.Thread(target=self.api.served.close, daemon=True).start()
        await self._until_idle(time.monotonic() + LAST_WORDS, stops=3)
        generation.end_all()  # a step of the engine may take minutes: what waits for it is answered without it
        await self._until_idle(time.monotonic() + LAST_WORDS / 2, stops=3)
        for connection in self.server_state.connections:
            if isinstance(connection, H11Protocol) and connection.cycle and not connection.cycle.response_complete:
                connection.transport.abort()  # its client does not read

    async def _until_idle(self, deadline: float, stops: int) -> None:
        count = 0
        while self.api.runtime.in_flight and self.stops < stops and time.monotonic() < deadline:
            await asyncio.sleep(TICK)
            await self.on_tick(count := count + 2)


def run(settings: ServerSettings, notes: Mapping[str, Any] | None = None, environment: bool = False) -> int:
    """Serve until a signal; returns the exit code. Raises SquawqError if the model cannot be served.

    notes: flags without effect, and why, for the log. environment: log versions and the machine.
    """
    if settings.headless:
        from squawq.engine.vllm import run_node

        run_node(resolve(settings.model, revision=settings.revision), settings)
        return 0
    writer = logs.setup(settings.log_format, settings.log_level)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    notes = dict(notes or {})
    ours = settings.engine == "squawq"
    if settings.gpu_memory_utilization is not None and settings.device == "cpu" and ours:
        notes["gpu_memory_utilization"] = "on a CPU the number of tokens bounds the cache (--kv-tokens)"
    if settings.dtype != "auto" and settings.device == "cpu" and ours:
        notes["dtype"] = "on a CPU activations are float32"
    served, sockets = None, None
    try:
        if environment:
            logs.event(logger, logging.INFO, "environment", **_environment())
        if notes:
            logs.event(logger, logging.INFO, "these flags change nothing", **notes)
        sockets = bind(settings)
        with console.status(f"loading {settings.model}"):
            served = Served(settings)
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection, which stops all threads, need look at it
        _allow_files(settings.connections + 256)
        server = Server(Api(served))
        server.run(sockets)
    finally:
        ended = served is None or _close(served)
        for one in sockets or ():  # where no server took them
            one.close()
        ended &= writer.close(LAST_WORDS / 2)  # a log that nobody reads keeps no server
    code = 0 if server.started and not server.failed else 1
    if not ended:
        os._exit(code)
    return code


def _environment() -> dict[str, Any]:
    """Versions and the machine, for bug reports."""
    return {
        "squawq": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _close(served: Served) -> bool:
    """Close, and return whether all threads but the log's ended soon. An engine step or a check may take minutes."""
    threading.Thread(target=served.close, daemon=True).start()
    until = time.monotonic() + LAST_WORDS / 2
    while threading.active_count() > 2 and time.monotonic() < until:
        time.sleep(TICK / 5)
    return threading.active_count() <= 2


def _allow_files(wanted: int) -> None:
    """Raise the limit of open files: each connection is one, and the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def bind(settings: ServerSettings) -> list[socket.socket] | None:
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
    for family, kind, number, _, address in dict.fromkeys(found):
        if sockets:  # the same port, where any free one was asked for
            address = (address[0], sockets[0].getsockname()[1], *address[2:])
        try:
            sockets.append(_socket(family, kind, number, address))
        except OSError as error:
            if not sockets:
                raise _refusal(host, port, error) from error
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


def _refusal(host: str, port: int, error: OSError) -> ConfigError:
    reason = REASONS.get(error.errno or 0, os.strerror(error.errno) if error.errno else str(error))
    return ConfigError(f"cannot listen on {_place(host, port)}: {reason}")


def url(settings: ServerSettings, port: int) -> str:
    if settings.uds is not None:
        return str(settings.uds)
    return f"{'https' if settings.ssl_certfile else 'http'}://{_place(settings.host, port)}"


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_open(settings: ServerSettings) -> bool:
    """Whether other machines can reach the server, and need no API key."""
    if settings.api_keys or settings.uds is not None:
        return False
    try:
        return not ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        return settings.host != "localhost"
