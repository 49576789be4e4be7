"""Work on untrusted input in processes of their own: too much time or memory ends a process, and a crash is its alone.

`Child.start` loads what the work needs, once. `fork` copies a process as it stands, in milliseconds, and the copy goes
on by itself. Messages and answers are bytes over Unix sockets; nothing is pickled. A process ends when nobody holds its
other end any more. Knows nothing of the work.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import signal
import socket
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

Handler = Callable[[bytes], bytes]

_HEADER = struct.Struct("<Id")  # a message's bytes, and the processor seconds that its answer may take
_SIZE = struct.Struct("<I")  # an answer's bytes
_PATIENCE = 30.0  # seconds to wait beyond the limit: on a busy machine a process gets less than a second a second
_ENVIRONMENT = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG", "TZ")  # no secrets
MEMORY = 128 * 2**20  # bytes that a process may take beyond what was loaded (Linux)


class ChildError(RuntimeError):
    """The process ended or gave no answer: over its limits, or crashed."""


class Child:
    """The near end of a process. For one thread at a time, but for `fork`."""

    def __init__(self, port: socket.socket, process: subprocess.Popen[bytes] | None = None) -> None:
        self._port = port
        self._process = process
        self._end = weakref.finalize(self, _end, port, process)

    @classmethod
    def start(cls, load: str, data: bytes) -> Child:
        """A new process that calls `load`, "module:function", with `data`: that returns what answers its messages.

        Raises ChildError when it does not load, and on a system without fork().
        """
        if not hasattr(os, "fork"):
            raise ChildError("this system has no fork()")
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        near, far = socket.socketpair()
        with far:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "squawq.child", load],
                stdin=far.fileno(),
                stdout=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        child = cls(near, process)
        child.call(data, _PATIENCE)
        return child

    @property
    def alive(self) -> bool:
        """Whether a started process still runs."""
        return self._process is not None and self._process.poll() is None

    def fork(self) -> Child:
        """A copy of the process, as it is after the messages sent so far. Raises ChildError."""
        try:
            near, far = socket.socketpair()
        except OSError as error:
            raise ChildError(f"no process can be reached: {error.strerror}") from error
        copy = Child(near)
        with far:
            try:
                socket.send_fds(self._port, [_HEADER.pack(0, 0)], [far.fileno()])
            except OSError as error:
                raise ChildError("the process has ended") from error
        return copy

    def send(self, message: bytes, seconds: float) -> None:
        """Ask for an answer, which may take so many seconds of processor time. Raises ChildError."""
        self._port.settimeout(seconds + _PATIENCE)
        try:
            self._port.sendall(_HEADER.pack(len(message), seconds) + message)
        except OSError as error:
            raise ChildError("the process has ended") from error

    def receive(self) -> bytes:
        """The answer to the oldest message that has none. Raises ChildError."""
        try:
            return _read(self._port, *_SIZE.unpack(_read(self._port, _SIZE.size)))
        except (OSError, EOFError) as error:
            raise ChildError("it took too much time or memory, or crashed") from error

    def call(self, message: bytes, seconds: float) -> bytes:
        """Send and receive."""
        self.send(message, seconds)
        return self.receive()

    def close(self) -> None:
        """Let the process end. Idempotent."""
        self._end()


def _end(port: socket.socket, process: subprocess.Popen[bytes] | None) -> None:
    port.close()
    if process is not None:
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:  # it waits for its copies, one of which is still held
            process.kill()
            process.wait()


def _read(port: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = port.recv(min(size - len(data), 2**20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _main(load: str) -> None:
    """What the process does."""
    import resource  # not on Windows

    port = socket.socket(fileno=os.dup(0))
    module, _, function = load.partition(":")
    size, _ = _HEADER.unpack(_read(port, _HEADER.size))
    handle: Handler = getattr(importlib.import_module(module), function)(_read(port, size))
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would write to every page that the copies share
    with Path(os.devnull).open("r+b") as null:  # Rust and the C library write there when they abort
        for descriptor in (0, 2):
            os.dup2(null.fileno(), descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a copy ended
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what loading left over: half of the memory, and of the time that a copy takes
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    port.sendall(_SIZE.pack(0))
    _serve(port, handle)


def _serve(port: socket.socket, handle: Handler) -> None:
    while True:
        header, descriptors, _, _ = socket.recv_fds(port, _HEADER.size, 1, socket.MSG_WAITALL)
        if len(header) < _HEADER.size:
            break
        if descriptors:
            far = socket.socket(fileno=descriptors[0])
            with suppress(OSError):  # no more processes: the other end sees that there is none
                if os.fork() == 0:
                    port, far = far, port
            far.close()
            continue
        size, seconds = _HEADER.unpack(header)
        message = _read(port, size)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process, whatever it is doing
        answer = handle(message)
        signal.setitimer(signal.ITIMER_PROF, 0)
        port.sendall(_SIZE.pack(len(answer)) + answer)
    with suppress(ChildProcessError):  # first its copies end: nobody else would take their exit codes
        while True:
            os.wait()


if __name__ == "__main__":
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the other end is gone
        _main(sys.argv[1])
