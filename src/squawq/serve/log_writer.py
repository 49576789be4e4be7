"""Writes log lines to stderr from a thread of its own, so that a reader that stalls holds nobody: lines wait in a
bounded queue, and what does not fit is dropped and counted. Knows no loggers and no forms of a line.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable

MAX_LINES = 4096  # that wait to be written
LIMITED = 20  # lines of the limited kind that are written in a period
PERIOD = 1.0  # seconds


class Writer:
    """A queue of lines and the thread that writes them. `put` and `allows` may be called from any thread.

    note: makes a line that says how many lines were dropped or suppressed. Lines go to what sys.stderr is now.
    """

    def __init__(self, note: Callable[..., str]) -> None:
        self._note = note
        self._write = _descriptor_writer() or _stream_writer()
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_LINES)
        self._lock = threading.Lock()  # guards what follows
        self._dropped = 0
        self._suppressed = 0
        self._said = 0.0  # when the suppressed ones were told last
        self._period, self._written = 0.0, 0
        # A daemon: a write that waits for its reader must not keep the process.
        self._thread = threading.Thread(target=self._work, name="squawq-logs", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Queue a line; drop and count it where the queue is full."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            with self._lock:
                self._dropped += 1

    def allows(self) -> bool:
        """Whether one more line of the limited kind may be written in this period; it is counted if not."""
        with self._lock:
            now = time.monotonic()
            if now - self._period >= PERIOD:
                self._period, self._written = now, 0
            self._written += 1
            if self._written > LIMITED:
                self._suppressed += 1
            return self._written <= LIMITED

    def close(self, timeout: float) -> bool:
        """Write what is queued and end the thread; False where its reader does not let it within `timeout` seconds."""
        try:
            self._lines.put(None, timeout=timeout)
        except queue.Full:
            return False
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        open_ = True
        while open_:
            try:
                line = self._lines.get(timeout=PERIOD)
            except queue.Empty:
                self._say_counts()
                continue
            if line is None:
                open_ = False
            else:
                self._put_out(line)
            self._say_counts(last=not open_)
            self._lines.task_done()

    def _say_counts(self, last: bool = False) -> None:
        """Say what was left out: dropped lines at once, suppressed ones once a period."""
        with self._lock:
            dropped, suppressed, now = self._dropped, self._suppressed, time.monotonic()
            self._dropped = 0
            if now - self._said < PERIOD and not last:
                suppressed = 0
            if suppressed:
                self._suppressed, self._said = 0, now
        if dropped:
            self._put_out(self._note("log lines dropped: their reader was too slow", lines=dropped))
        if suppressed:
            self._put_out(self._note("log lines suppressed: refused requests", lines=suppressed))

    def _put_out(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more; the server goes on
            self._write(line + "\n")


def _descriptor_writer() -> Callable[[str], object] | None:
    """Writes past sys.stderr's own lock, which the interpreter's end would wait for; None where it is no file."""
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return None

    def write(text: str) -> None:
        rest = text.encode()
        while rest:
            rest = rest[os.write(descriptor, rest) :]

    return write


def _stream_writer() -> Callable[[str], object]:
    stream = sys.stderr

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return write
