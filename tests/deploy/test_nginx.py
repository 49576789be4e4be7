"""nginx as deploy/nginx.conf has it, before two servers: streams come at once, and a rolling restart loses nothing."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import programs
import pytest
from running import process

from squawq.demo import demo_model

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
CONF = Path(__file__).parents[2] / "deploy" / "nginx.conf"
pytestmark = pytest.mark.skipif(NGINX is None, reason="needs the program nginx")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def nginx(folder: Path, ports: tuple[int, int]) -> Iterator[str]:
    """nginx with our file, its ports changed, as an ordinary user in a folder of its own."""
    front, text = free_port(), CONF.read_text()
    for before, after in (("127.0.0.1:8001", ports[0]), ("127.0.0.1:8002", ports[1])):
        assert text.count(before) == 1
        text = text.replace(before, f"127.0.0.1:{after}")
    text = text.replace("listen 8000;", f"listen 127.0.0.1:{front};")
    own = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off;\npid {folder}/pid;\nerror_log {folder}/error.log;\nworker_processes 1;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{own}{text}\n}}\n"
    )
    assert NGINX is not None
    command = [NGINX, "-p", str(folder), "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:
        try:
            end = time.monotonic() + 10
            while time.monotonic() < end and running.poll() is None:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", front)) == 0:
                        break
                time.sleep(0.05)
            assert running.poll() is None, (folder / "error.log").read_text()
            yield f"http://127.0.0.1:{front}"
        finally:
            running.terminate()


def serve(port: int) -> Any:
    return process(["serve", str(demo_model()), "--port", str(port), "--device", "cpu", "--threads", "1"])


def post(url: str, session: str = "", **fields: Any) -> Any:
    told = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 8, **fields}
    headers = {"Content-Type": "application/json", "X-Session": session}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(told).encode(), headers)
    return urllib.request.urlopen(request, timeout=60)


def running(port: int) -> int:
    """Requests under way on a server."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        found = re.search(rb"^vllm:num_requests_running\{.*\} (\d+)", answer.read(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def test_a_stream_is_not_buffered_and_a_restart_loses_nothing(tmp_path: Path) -> None:
    ports = free_port(), free_port()
    with ExitStack() as stack:
        servers: list[tuple[programs.Program, ExitStack]] = []
        for port in ports:
            own = stack.enter_context(ExitStack())
            servers.append((own.enter_context(serve(port))[0], own))
        url = stack.enter_context(nginx(tmp_path, ports))

        with post(url, stream=True, max_tokens=3500, ignore_eos=True) as answer:
            assert answer.readline().startswith(b"data: {")
            assert sum(map(running, ports)) == 1, "nginx kept the stream back until its end"

        stop = threading.Event()
        failures: list[str] = []
        answers: list[str] = []

        def client(number: int) -> None:
            while not stop.is_set():
                try:
                    with post(url, session=f"{number} {len(answers)}") as reply:
                        answers.append(json.loads(reply.read())["choices"][0]["text"])
                except (OSError, ValueError) as error:
                    failures.append(repr(error))

        clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in clients:
            thread.start()
        try:
            for index, port in enumerate(ports):
                before = len(answers)
                server, own = servers[index]
                server.send_signal(signal.SIGTERM)
                assert server.wait(60) == 0
                own.close()
                fresh = stack.enter_context(ExitStack())
                servers[index] = fresh.enter_context(serve(port))[0], fresh
                time.sleep(2.5)  # nginx tries it again after fail_timeout
                assert len(answers) > before, "nothing was answered meanwhile"
        finally:
            stop.set()
            for thread in clients:
                thread.join()
        assert failures == []
        assert len(set(answers)) == 1  # greedy text, by whichever server
