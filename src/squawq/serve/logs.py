"""Logs on stderr, one line a record, as text or JSON: the time, the level, an event and its fields.

Values are cut at MAX_VALUE characters and written in printable ASCII, so that no request can forge a line or grow the
log. A thread of its own writes the lines from a bounded queue: a reader that stalls blocks nothing but the log.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable

from squawq.errors import ConfigError

MAX_LINES = 4096  # in the queue
LIMITED = 20  # limited lines per period
PERIOD = 1.0  # seconds
FORMS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error", "critical")
MAX_VALUE = 500
MAX_TRACEBACK = 8000
_BARE = re.compile(r"[\w.:/@+-]+", re.ASCII)
_ROOTS = ("squawq", "uvicorn", "asyncio")
_Value = str | int | float | bool | None


class LogWriter:
    """A bounded queue of lines and the thread that writes them to sys.stderr. Thread-safe.

    note: makes the line that says how many lines were dropped or suppressed.
    """

    def __init__(self, note: Callable[..., str]) -> None:
        self._note = note
        self._write = _stderr_writer()
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_LINES)
        self._lock = threading.Lock()  # guards what follows
        self._dropped = 0
        self._suppressed = 0
        self._said = 0.0  # when suppressed lines were reported last
        self._period, self._written = 0.0, 0
        # A daemon, since a blocked write must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="squawq-logs", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Queue a line. If the queue is full, drop and count it."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            with self._lock:
                self._dropped += 1

    def allows(self) -> bool:
        """Whether one more limited line may be written in this period; if not, it is counted."""
        with self._lock:
            now = time.monotonic()
            if now - self._period >= PERIOD:
                self._period, self._written = now, 0
            self._written += 1
            if self._written > LIMITED:
                self._suppressed += 1
            return self._written <= LIMITED

    def close(self, timeout: float) -> bool:
        """Write what is queued and end the thread. Returns False if that takes more than `timeout` seconds."""
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
                self._write_line(line)
            self._say_counts(last=not open_)
            self._lines.task_done()

    def _say_counts(self, last: bool = False) -> None:
        """Log how many lines were left out: dropped ones at once, suppressed ones once a period."""
        with self._lock:
            dropped, suppressed, now = self._dropped, self._suppressed, time.monotonic()
            self._dropped = 0
            if now - self._said < PERIOD and not last:
                suppressed = 0
            if suppressed:
                self._suppressed, self._said = 0, now
        if dropped:
            self._write_line(self._note("log lines dropped: their reader was too slow", lines=dropped))
        if suppressed:
            self._write_line(self._note("log lines suppressed: refused requests", lines=suppressed))

    def _write_line(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more; the server goes on
            self._write(line + "\n")


def _stderr_writer() -> Callable[[str], object]:
    """Writes to stderr's descriptor, past sys.stderr's lock, for which the interpreter's exit would wait; to sys.stderr
    if that is not a file."""
    stream = sys.stderr
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return lambda text: (stream.write(text), stream.flush())

    def write(text: str) -> None:
        rest = text.encode()
        while rest:
            rest = rest[os.write(descriptor, rest) :]

    return write


def setup(form: str, level: str) -> LogWriter:
    """Log squawq, uvicorn and asyncio to stderr only. May be called again. Start uvicorn with log_config=None.

    Returns the writer, to be closed at the end. Raises ConfigError for an unknown form or level.
    """
    if form not in FORMS:
        raise ConfigError(f"log format is {form!r}; choose one of {', '.join(FORMS)}")
    if level.lower() not in LEVELS:
        raise ConfigError(f"log level is {level!r}; choose one of {', '.join(LEVELS)}")
    formatter = Formatter(form)

    def note(name: str, **fields: object) -> str:
        record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, "%s", (name,), None)
        record.fields = fields
        return formatter.format(record)

    writer = LogWriter(note)
    handler = Handler(writer)
    handler.setFormatter(formatter)
    for name in _ROOTS:
        root = logging.getLogger(name)
        root.handlers = [handler]
        root.propagate = False
        root.setLevel(level.upper())
    for name in ("uvicorn.access", "uvicorn.error"):  # uvicorn's own configuration may have been here before
        child = logging.getLogger(name)
        child.handlers = []
        child.propagate = True
        child.setLevel(logging.NOTSET)
    return writer


def event(logger: logging.Logger, level: int, name: str, /, *, limited: bool = False, **fields: object) -> None:
    """Log an event with its fields. limited: anybody can cause it, so only LIMITED lines per second are written."""
    logger.log(level, "%s", name, extra={"fields": fields, "limited": limited})


def lines(logger: logging.Logger, text: str) -> None:
    """Write lines for people as they are, in the order of the log. Only for text that no request has part in."""
    logger.info("%s", text, extra={"as_it_is": True})


class Handler(logging.Handler):
    """Formats records in the calling thread, so that their arguments are not kept, and queues the lines."""

    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            invalid = record.name.startswith("uvicorn") and record.levelno == logging.WARNING  # a request, it says
            limited = getattr(record, "limited", False) or invalid
            if not limited or self._writer.allows():
                self._writer.put(self.format(record))
        except Exception:
            self.handleError(record)


class Formatter(logging.Formatter):
    """Formats a record as one line. In text form, values other than words are JSON."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        if getattr(record, "as_it_is", False) and not self._json:
            return record.getMessage()
        head: dict[str, _Value] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname,
            "event": _plain(record.getMessage()),
        }
        fields = {str(_plain(name)): _plain(value) for name, value in getattr(record, "fields", {}).items()}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)[-MAX_TRACEBACK:]  # the error itself is last
        if self._json:
            return json.dumps({**head, **fields, **head})  # no field takes the place of the head's
        words = [_word(value) for value in head.values()]
        return " ".join(words + [f"{_word(name)}={_word(value)}" for name, value in fields.items()])


def _plain(value: object) -> _Value:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    try:
        text = str(value)
    except Exception:  # such as the ValueError of an int with too many digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 3] + "..."


def _word(value: _Value) -> str:
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) else json.dumps(value)
    return json.dumps(value)
