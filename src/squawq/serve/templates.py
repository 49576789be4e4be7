"""Renders a model's chat template in processes of its own, so that a hostile template can neither hang the server, nor
take its memory, nor read its files. squawq.chat_template is what runs there; lines of JSON go over pipes.

Knows no HTTP and no tokenizer. The limits of memory and files hold on Linux; other systems may apply fewer of them.
"""

from __future__ import annotations

import json
import math
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from squawq import chat_template
from squawq.errors import ConfigError, EngineClosed, QueueFull

START_S = 60.0  # far more than a start takes
MAX_REPLY = 16 * 2**20
_READ = 64 * 1024  # what a pipe holds
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG", "TZ")  # no secrets


class TemplateProcess:
    """A template and the processes that render it; they start at once. May be used from several threads.

    variables: what the template reads in every chat, as bos_token. tool_template: for chats with tools, where the model
    has one for those. memory_bytes: address space of a process, of which Python takes about 50 MB. timeout_s: the time
    that one chat may take to render, and to wait for a free process. workers: how many processes.
    """

    def __init__(
        self,
        template: str,
        variables: Mapping[str, Any] | None = None,
        *,
        tool_template: str | None = None,
        timeout_s: float = 10,
        memory_bytes: int = 2**30,
        workers: int = 1,
    ) -> None:
        if not 0 < timeout_s < math.inf or workers < 1:
            raise ConfigError(f"timeout_s is {timeout_s}, workers {workers}; both must be above 0")
        self._template = template
        self._tool_template = template if tool_template is None else tool_template
        self._variables = dict(variables or {})
        self._timeout_s = timeout_s
        self._workers = [_Worker(memory_bytes, timeout_s) for _ in range(workers)]
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._closing = threading.Lock()
        for worker in self._workers:
            self._free.put(worker)
        try:
            for worker in self._workers:
                worker.start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TemplateProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        generation_prompt: bool = True,
        continue_final: bool = False,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The chat as text; `variables` win over those of every chat. Otherwise as squawq.chat_template.render.

        Raises ConfigError for a chat that the template refuses or does not render within the limits, QueueFull where
        other chats hold every process, EngineClosed after `close`.
        """
        request = {
            "template": self._tool_template if tools else self._template,
            "messages": messages,
            "tools": tools,
            "generation_prompt": generation_prompt,
            "continue_final": continue_final,
            "variables": {**self._variables, **(variables or {})},
            "now": None if now is None else now.isoformat(),
        }
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"the chat cannot be written as JSON: {error!s:.200}") from error
        with self._worker() as worker:
            return worker.ask(line)

    def close(self) -> None:
        """End the processes and what they render. Idempotent; may be called from any thread."""
        for worker in self._workers:
            worker.stop()
        with self._closing:
            idle = [self._free.get() for _ in self._workers]  # each comes back, since its process was killed
            for worker in idle:
                worker.end()
                self._free.put(worker)

    @contextmanager
    def _worker(self) -> Iterator[_Worker]:
        try:
            worker = self._free.get(timeout=self._timeout_s)
        except queue.Empty as error:
            raise QueueFull("other chats are being rendered; try again later") from error
        try:
            yield worker
        finally:
            self._free.put(worker)


class _Worker:
    """One process, started again when it has ended. One thread at a time uses it; `stop` is for any thread."""

    def __init__(self, memory_bytes: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        seconds = timeout_s + 1  # its own limit, for a parent that was killed
        program = ("-P", "-m", chat_template.__name__, str(memory_bytes), str(seconds))
        self._command = (sys.executable, *program)
        self._lock = threading.Lock()  # a stopped worker starts no process
        self._stopped = False
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process and wait until it is ready. Raises ConfigError where it does not start."""
        with self._lock:
            if self._stopped:
                raise EngineClosed("the chat template's process was closed")
            self._process = process = subprocess.Popen(
                self._command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)  # a write may not wait longer than the limit
        with self._ended(f"did not start within {START_S:g} s"):
            _read_line(process, time.monotonic() + START_S)

    def ask(self, line: bytes) -> str:
        """The rendered text for a request."""
        if self._process is None or self._process.poll() is not None:
            self.end()
            self.start()
        assert self._process is not None
        with self._ended(f"took longer than {self._timeout_s:g} s"):
            deadline = time.monotonic() + self._timeout_s
            _write(self._process, line, deadline)
            reply = json.loads(_read_line(self._process, deadline))
        if "error" in reply:
            raise ConfigError(reply["error"])
        return str(reply["text"])

    def stop(self) -> None:
        """Kill the process, now and for good. `end` gives back what it held."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()

    def end(self) -> int | None:
        """Kill the process if it runs, close its pipes, and return its exit code."""
        if self._process is None:
            return None
        with self._process as process:  # closes the pipes and waits
            process.kill()
        return process.returncode

    @contextmanager
    def _ended(self, late: str) -> Iterator[None]:
        """End the process on any error: the next line that it wrote would answer this request, not the next one."""
        try:
            yield
        except TimeoutError as error:
            self.end()
            raise ConfigError(f"the chat template {late}") from error
        except (EOFError, BrokenPipeError, json.JSONDecodeError) as error:
            code = self.end()
            if self._stopped:
                raise EngineClosed("the chat template's process was closed") from error
            raise ConfigError(f"the chat template's process died (code {code}), perhaps out of memory") from error
        except BaseException:
            self.end()
            raise


def _write(process: subprocess.Popen[bytes], line: bytes, deadline: float) -> None:
    assert process.stdin is not None
    pipe, rest = process.stdin.fileno(), memoryview(line)
    while rest:
        _wait(pipe, select.POLLOUT, deadline)
        rest = rest[os.write(pipe, rest) :]


def _read_line(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    assert process.stdout is not None
    pipe, line = process.stdout.fileno(), bytearray()
    while not line.endswith(b"\n"):
        _wait(pipe, select.POLLIN, deadline)
        piece = os.read(pipe, _READ)
        if not piece:
            raise EOFError
        line += piece
        if len(line) > MAX_REPLY:
            raise ConfigError(f"the chat template writes more than {MAX_REPLY} bytes")
    return bytes(line)


def _wait(pipe: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
