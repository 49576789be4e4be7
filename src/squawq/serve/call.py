"""Call: the interface between a dialect and the runtime, and the JSON that dialects write.

A dialect turns a request's body into engine requests, and their outputs into a reply or stream events. It uses no HTTP
and no threads; runtime.py runs every Call in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from squawq.engine.request import Output, Request
from squawq.errors import ConfigError
from squawq.serve.errors import ApiError

MIN_LOGPROB = -9999.0  # JSON has no minus infinity
# Clients that split a stream into lines as str.splitlines does would end one at these.
_LINE_ENDS = {mark: f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}
_ROWS = 64  # of LazyList that are encoded at once: json holds the interpreter's lock, and others wait for it
_ITEMS = 4096  # of a plain list
Item = TypeVar("Item")


class LazyList(Generic[Item]):
    """A JSON array that makes its rows while they are written, so that a long one is never in memory."""

    def __init__(self, make: Callable[[Item], object], items: Sequence[Item]) -> None:
        self._make, self._items = make, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, part: slice) -> list[object]:
        return [self._make(item) for item in self._items[part]]


def dump(value: object) -> str:
    """Compact JSON on one line, without ASCII escapes. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_rows)
    if not text.isascii():
        for mark, escape in _LINE_ENDS.items():
            text = text.replace(mark, escape)
    return text


def dump_large(value: object) -> str:
    """`dump` for a large value; call it in a worker thread."""
    return "".join(pieces(value))


def pieces(value: object) -> Iterator[str]:
    """`dump` in small pieces, so that other threads can take the interpreter's lock in between."""
    if isinstance(value, dict) and any(isinstance(item, dict | list | LazyList) for item in value.values()):
        begin = "{"
        for key, item in value.items():
            yield f"{begin}{dump(key)}:"
            yield from pieces(item)
            begin = ","
        yield "}"
    elif isinstance(value, list) and len(value) <= _ITEMS and any(isinstance(item, dict | LazyList) for item in value):
        begin = "["
        for item in value:
            yield begin
            yield from pieces(item)
            begin = ","
        yield "]"
    elif isinstance(value, list | LazyList) and len(value):
        begin, step = "[", _ROWS if isinstance(value, LazyList) else _ITEMS
        for first in range(0, len(value), step):
            yield begin + dump(value[first : first + step])[1:-1]
            begin = ","
        yield "]"
    else:
        yield dump(value)


def _rows(value: object) -> list[object]:
    if isinstance(value, LazyList):
        return value[:]
    raise TypeError(f"{type(value).__name__} is no JSON value")


@dataclass(frozen=True)
class Reply:
    """A complete reply: a JSON value and further headers."""

    body: object
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Times:
    """Times of a request on one clock, in seconds: arrived, submitted to the engine, first token, end."""

    arrived: float
    checked: float
    first: float
    ended: float


class Call(Protocol):
    """A request in a dialect. Payloads are the texts after `data: ` in a stream.

    Attributes:
        stream: Whether the client asked for a stream.
    """

    stream: bool

    @property
    def requests(self) -> Sequence[Request]:
        """For the engine, in the order of the prompts."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Further headers of a stream."""
        ...

    def invalid(self, error: ConfigError) -> ApiError:
        """The reply to a request that the engine refuses."""
        ...

    def push(self, output: Output) -> list[str]:
        """Payloads for one output, maybe none. Outputs of a sequence come in order."""
        ...

    def end(self) -> list[str]:
        """Payloads after the last output."""
        ...

    def fail(self, error: ApiError) -> list[str]:
        """Payloads that end a started stream with an error."""
        ...

    def reply(self, outputs: Sequence[Sequence[Output]], times: Times, /) -> Reply:
        """The complete reply, from each request's joined sequences. Raises ApiError for failed sequences."""
        ...


def finite_logprob(logprob: float) -> float:
    """A log probability as JSON can write it."""
    return max(logprob, MIN_LOGPROB)
