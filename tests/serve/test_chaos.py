"""What happens around a server goes wrong: nobody reads its log."""

from __future__ import annotations

import signal
import socket
import subprocess
from urllib.parse import urlsplit

import programs
from running import DEFAULTS

REQUESTS = 600  # a log line each, far more bytes than a pipe holds


def test_a_log_that_nobody_reads_stops_nothing() -> None:
    """Stderr is a full pipe: requests are answered, and a signal ends the server."""
    command = ["-m", "squawq", "serve", DEFAULTS["model"], "--port", "0", "--threads", "1"]
    flags = ["--kv-tokens", "4096", "--log-level", "debug"]
    with programs.Program([*command, *flags], stderr=subprocess.PIPE) as server:
        try:
            assert server.stderr is not None
            url = next(word for line in server.stderr for word in line.split() if word.startswith("at=http"))
            parts = urlsplit(url.removeprefix("at="))
            asked = f"GET /health HTTP/1.1\r\nHost: a\r\nX-Request-Id: {'x' * 128}\r\n"
            for _ in range(REQUESTS // 20):
                with socket.create_connection((parts.hostname, parts.port), 20) as connection:
                    connection.sendall(f"{asked}\r\n".encode() * 19 + f"{asked}Connection: close\r\n\r\n".encode())
                    answered = b"".join(iter(lambda: connection.recv(65536), b""))
                    assert answered.count(b"HTTP/1.1 200") == 20
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
            assert 0 < len(server.stderr.read()) < REQUESTS * 200, "the pipe was not full"
        finally:
            server.kill()
