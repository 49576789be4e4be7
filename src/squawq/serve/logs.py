"""Logs on stderr, one line a record, as text or JSON: the time, the level, an event and its fields.

Every value is cut at MAX_VALUE characters and written in printable ASCII, so that no request can forge a line or grow
the log. A thread of its own writes the lines: a reader that stalls stops nothing but the log (log_writer.py). Knows
nothing of requests: what is logged is its callers' choice.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time

from squawq.errors import ConfigError
from squawq.serve.log_writer import Writer

FORMS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error", "critical")
MAX_VALUE = 500
MAX_TRACEBACK = 8000

_BARE = re.compile(r"[\w.:/@+-]+", re.ASCII)
_ROOTS = ("squawq", "uvicorn", "asyncio")
_Value = str | int | float | bool | None


def setup(form: str, level: str) -> Writer:
    """Send what squawq, uvicorn and asyncio log to stderr, and to nothing else. Returns the writer, to be closed.

    Start uvicorn with log_config=None after this. May be called again. Raises ConfigError for an unknown form or level.
    """
    if form not in FORMS:
        raise ConfigError(f"log format is {form!r}; choose one of {', '.join(FORMS)}")
    if level.lower() not in LEVELS:
        raise ConfigError(f"log level is {level!r}; choose one of {', '.join(LEVELS)}")
    formatter = Formatter(form)
    writer = Writer(lambda name, **fields: formatter.format(_record(name, fields)))
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
    """Log an event with its fields. limited: anybody can cause it, without a key; only so many a second are written."""
    logger.log(level, "%s", name, extra={"fields": fields, "limited": limited})


def _record(name: str, fields: dict[str, object]) -> logging.LogRecord:
    made = logging.LogRecord(__name__, logging.WARNING, __file__, 0, "%s", (name,), None)
    made.fields = fields
    return made


class Handler(logging.Handler):
    """Formats a record on its own thread, so that no request is held, and gives the line to the writer."""

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            limited = getattr(record, "limited", False) or _unasked(record)
            if not limited or self._writer.allows():
                self._writer.put(self.format(record))
        except Exception:
            self.handleError(record)


def _unasked(record: logging.LogRecord) -> bool:
    """Whether uvicorn warns of a client's bytes that were no request."""
    return record.name.startswith("uvicorn") and record.levelno == logging.WARNING


class Formatter(logging.Formatter):
    """Writes a record as a line. In text, a word stands bare and anything else in JSON's quotes."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
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
    """A value that JSON can hold, bounded."""
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
