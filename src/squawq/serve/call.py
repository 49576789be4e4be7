"""What a generation route makes of a request's body: engine requests, and how their outputs become a reply or a stream.

Pure: no HTTP, no threads. generation.py runs every Call in the same way, whatever its dialect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from squawq import __version__
from squawq.engine.request import Output, Request
from squawq.errors import ConfigError
from squawq.serve.errors import ApiError

DONE = "[DONE]"
MIN_LOGPROB = -9999.0  # JSON has no minus infinity
# Clients that split a stream into lines as str.splitlines does would end one at these.
_LINE_ENDS = {mark: f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}
_ROWS = 64  # of LazyList that are encoded at once: json holds the interpreter's lock, and others wait for it
_ITEMS = 4096  # of a plain list
Item = TypeVar("Item")


class LazyList(Generic[Item]):
    """A JSON array whose rows are made from items as they are written, so that a long one is never held."""

    def __init__(self, make: Callable[[Item], object], items: Sequence[Item]) -> None:
        self._make, self._items = make, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, part: slice) -> list[object]:
        return [self._make(item) for item in self._items[part]]


def dump(value: object) -> str:
    """Compact JSON in one line, characters as they are. Raises ValueError for a number that JSON has not."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_rows)
    if not text.isascii():
        for mark, escape in _LINE_ENDS.items():
            text = text.replace(mark, escape)
    return text


def dump_large(value: object) -> str:
    """The same for a large value, in a thread beside the event loop."""
    return "".join(pieces(value))


def pieces(value: object) -> Iterator[str]:
    """The same in pieces, each of which is made in a moment, so that other threads get their turn."""
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
    """A whole answer: a JSON value and what to add to the headers."""

    body: object
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Times:
    """Of a request, in seconds of one clock: arrived, checked and tokenized, first token, last token."""

    arrived: float
    checked: float
    first: float
    ended: float


class Call(Protocol):
    """A request under way. The payloads of `push` and `end` are the texts after `data: ` of a stream.

    requests: for the engine, in the order of the prompts. stream: which of the two kinds of answer was asked for.
    """

    stream: bool

    @property
    def requests(self) -> Sequence[Request]:
        """What to run."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """What to add to the head of a stream."""
        ...

    def invalid(self, error: ConfigError) -> ApiError:
        """The error reply for requests that the engine refuses."""
        ...

    def push(self, output: Output) -> list[str]:
        """Payloads for one output; none where it adds nothing to see. Outputs of a sequence come in order."""
        ...

    def end(self) -> list[str]:
        """Payloads after the last output."""
        ...

    def fail(self, error: ApiError) -> list[str]:
        """Payloads that end a stream which had begun, saying why."""
        ...

    def reply(self, outputs: Sequence[Sequence[Output]], times: Times, /) -> Reply:
        """The whole answer: for each request its sequences, joined. Raises ApiError for sequences that failed."""
        ...


def head(call: str, kind: str, created: int, model: str) -> dict[str, Any]:
    """What every OpenAI reply and chunk begins with."""
    fingerprint = f"squawq-{__version__}"
    return {"id": call, "object": kind, "created": created, "model": model, "system_fingerprint": fingerprint}


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Tokens read and written, in OpenAI's words."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def finite_logprob(logprob: float) -> float:
    """A finite number."""
    return max(logprob, MIN_LOGPROB)
