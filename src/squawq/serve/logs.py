"""Logs on stderr, one line a record, as text or JSON: the time, the level, an event and its fields.

Every value is cut at MAX_VALUE characters and written in printable ASCII, so that no request can forge a line or grow
the log. Knows nothing of requests: what is logged is its callers' choice.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time

from squawq.errors import ConfigError

FORMS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error", "critical")
MAX_VALUE = 500
MAX_TRACEBACK = 8000

_BARE = re.compile(r"[\w.:/@+-]+", re.ASCII)
_ROOTS = ("squawq", "uvicorn")
_Value = str | int | float | bool | None


def setup(form: str, level: str) -> None:
    """Send what squawq and uvicorn log to stderr, and to nothing else.

    Start uvicorn with log_config=None after this. May be called again. Raises ConfigError for an unknown form or level.
    """
    if form not in FORMS:
        raise ConfigError(f"log format is {form!r}; choose one of {', '.join(FORMS)}")
    if level.lower() not in LEVELS:
        raise ConfigError(f"log level is {level!r}; choose one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(form))
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


def event(logger: logging.Logger, level: int, name: str, /, **fields: object) -> None:
    """Log an event with its fields."""
    logger.log(level, "%s", name, extra={"fields": fields})


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
