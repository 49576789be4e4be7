"""Sandboxed child processes for untrusted input: a crash, or too much time or memory, ends the child alone.

`Child.start` launches a child and loads what the work needs, once. `fork` copies the child in milliseconds, state
included. Requests and replies are bytes over Unix sockets; nothing is pickled. A child exits when its socket closes.
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
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

Handler = Callable[[bytes], bytes]

_HEADER = struct.Struct("<Id")  # a message's bytes, and the processor seconds that its answer may take
_SIZE = struct.Struct("<I")  # an answer's bytes
_PATIENCE = 30.0  # seconds to wait beyond the limit: on a busy machine a process gets less than a second a second
_ENVIRONMENT = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG", "TZ")  # no secrets
_THREADS = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # threads' stacks count as memory
MEMORY = 128 * 2**20  # bytes that a process may take beyond what was loaded (Linux)
LOAD_MEMORY = 4 * 2**30  # bytes that it may take while it loads
LOAD_S = 60  # seconds of processor time for that
MAX_ANSWER = 16 * 2**20


def environment(*more: str) -> dict[str, str]:
    """What a child process of Python gets of this one's environment: no secrets, and the variables `more`."""
    found = {name: os.environ[name] for name in (*_ENVIRONMENT, *more) if name in os.environ}
    return found | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


class ChildError(RuntimeError):
    """The process ended or did not answer: it exceeded its limits, or crashed."""


class Child:
    """A handle on a child process. Only `fork` and `kill` may be called while another thread uses it."""

    def __init__(self, port: socket.socket, process: subprocess.Popen[bytes] | None = None, forks: bool = True) -> None:
        self._port, self._process, self._owner = port, process, os.getpid()
        self._seconds = 0.0  # what the latest message may take
        self._end = weakref.finalize(self, _end, port, process, forks, self._owner)

    @classmethod
    def start(cls, load: str, data: bytes, *, memory: int = MEMORY, forks: bool = True) -> Child:
        """Start a process that calls `load(data)` once, and answers each message with the handler that this returns.

        Args:
            load: "module:function".
            memory: Bytes the process may allocate after loading.
            forks: Whether it can be forked; one that cannot is also kept from opening files.

        Raises:
            ChildError: It does not load, or the system has no fork().
        """
        if not hasattr(os, "fork"):
            raise ChildError("it needs a system with fork(), as Linux and macOS have it (on Windows: WSL)")
        near, far = socket.socketpair()
        with far:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "squawq.text.child", load, str(memory), str(int(forks))],
                stdin=far.fileno(),
                stdout=subprocess.DEVNULL,
                env=environment() | _THREADS,
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        child = cls(near, process, forks)
        child.call(data, _PATIENCE)
        return child

    @property
    def pid(self) -> int | None:
        """The number of a started process; None for a copy."""
        return None if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        """Whether a started process still runs; False in a fork() of the process that started it."""
        return self._process is not None and self._owner == os.getpid() and self._process.poll() is None

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
        """Send a message, to be answered within `seconds` of processor time. Raises ChildError."""
        self._seconds = seconds
        try:
            self._port.settimeout(seconds + _PATIENCE)
            self._port.sendall(_HEADER.pack(len(message), seconds) + message)
        except OSError as error:
            raise ChildError(self._fate("the process has ended")) from error

    def receive(self) -> bytes:
        """Wait for the answer to the oldest unanswered message. Raises ChildError."""
        deadline = time.monotonic() + self._seconds + _PATIENCE
        try:
            (size,) = _SIZE.unpack(read_exactly(self._port, _SIZE.size, deadline))
            if size <= MAX_ANSWER:
                return read_exactly(self._port, size, deadline)
        except TimeoutError as error:
            self.close()
            raise ChildError(f"it gave no answer within {self._seconds + _PATIENCE:g} s") from error
        except (OSError, EOFError) as error:
            raise ChildError(self._fate("it took too much time or memory, or crashed")) from error
        self.close()
        raise ChildError(f"it answered with {size:,} bytes; {MAX_ANSWER:,} are allowed")

    def call(self, message: bytes, seconds: float) -> bytes:
        self.send(message, seconds)
        return self.receive()

    def kill(self) -> None:
        """Kill a started process; a thread that waits for its answer gets a ChildError."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Let the process end. Idempotent."""
        self._end()

    def _fate(self, unknown: str) -> str:
        """How a started process ended; `unknown` for a fork, whose exit code is not available."""
        if self._process is None or self._owner != os.getpid():
            return unknown
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self.close()
        code = self._process.returncode
        if code == -signal.SIGPROF:
            return f"it took more than {self._seconds:g} s of processor time"
        return f"it died (code {code}), perhaps out of memory"


def _end(port: socket.socket, process: subprocess.Popen[bytes] | None, forks: bool, owner: int) -> None:
    port.close()
    if process is None or owner != os.getpid():
        return
    if forks:
        with suppress(subprocess.TimeoutExpired):  # it waits for its copies, one of which is still held
            process.wait(1.0)
    process.kill()
    process.wait()


def read_exactly(port: socket.socket, size: int, deadline: float | None = None) -> bytes:
    """So many bytes. Raises EOFError when the other end is gone, TimeoutError after `deadline` (time.monotonic)."""
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            port.settimeout(max(0.001, deadline - time.monotonic()))
        piece = port.recv(min(size - len(data), 2**20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _main(load: str, memory: int, forks: bool) -> None:
    """The child's main function."""
    import resource  # not on Windows

    for signum in (signal.SIGINT, signal.SIGTERM):  # a supervisor sends them to all; the parent has work to finish
        signal.signal(signum, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory(LOAD_MEMORY, for_good=False)
    signal.setitimer(signal.ITIMER_PROF, LOAD_S)  # SIGPROF ends the process, whatever it is doing
    port = socket.socket(fileno=os.dup(0))
    module, _, function = load.partition(":")
    size, _ = _HEADER.unpack(read_exactly(port, _HEADER.size))
    handle: Handler = getattr(importlib.import_module(module), function)(read_exactly(port, size))
    if forks:
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection would write to every page that the copies share
    with Path(os.devnull).open("r+b") as null:  # Rust and the C library write there when they abort
        for descriptor in (0, 2):
            os.dup2(null.fileno(), descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a copy ended
    _limit_memory(memory, for_good=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if not forks:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # what is open stays open
    signal.setitimer(signal.ITIMER_PROF, 0)
    port.sendall(_SIZE.pack(0))
    _serve(port, handle)


def _limit_memory(more: int, for_good: bool) -> None:
    """Limit the address space to `more` bytes above the current size."""
    import resource

    if sys.platform != "linux":
        return
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what loading left over: half of the memory, and of the time that a copy takes
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = pages * resource.getpagesize() + more
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit if for_good else hard))


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
        message = read_exactly(port, size)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = handle(message)
        signal.setitimer(signal.ITIMER_PROF, 0)
        port.sendall(_SIZE.pack(len(answer)) + answer)
    with suppress(ChildProcessError):  # first its copies end: nobody else would take their exit codes
        while True:
            os.wait()


if __name__ == "__main__":
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the other end is gone
        _main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")
