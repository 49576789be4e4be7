"""Tool calls as text: messages for templates that know no tools, and the parser of what the model answers.

The parser reads an answer while it is generated, in pieces split anywhere; what is no call is content. It knows two
formats and the functions' names, no schemas. Each character is read once, and arguments are streamed as the model wrote
them: a JSON parser with partial input (pydantic_core.from_json) would parse all again for each piece, and return values
in place of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from squawq.serve.tools.grammar import ARGUMENT_KEYS, CLOSE, OPEN, check_format

_SHAPE = '{"name": the function, "%s": an object with its arguments}'
_SAY = "To call one of these functions, answer with nothing but %s. Give values, no variables."
PLAIN_PROMPTS = {
    "llama3_json": _SAY % ("JSON of the form " + _SHAPE % "parameters"),
    "hermes": _SAY % f"{OPEN}{_SHAPE % 'arguments'}{CLOSE}",
}
_SPACE = re.compile(r"[ \t\r\n]+")
_BETWEEN = re.compile(r"[ \t\r\n;]+")  # Llama's calls
_TO_MARKER = re.compile(r"[^<]+")
_IN_STRING = re.compile(r'[^"\\]+')
_SCALAR = re.compile(r"[\w.+-]+", re.ASCII)
_IN_VALUE = re.compile(r"[\w.+,: \t\r\n-]+", re.ASCII)  # what JSON has outside of strings and brackets
_ARGUMENTS = ("parameters", "arguments")


def plain_messages(
    form: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, prompt: str | None
) -> list[dict[str, Any]]:
    """Messages for a template without tools: the last user message ends with the tools, as in TGI, calls are the
    assistant's text, and their results a user's.

    form: of the calls, one of TOOL_FORMATS. prompt: how to call them; None for the format's of PLAIN_PROMPTS.
    """
    made = [dict(message) for message in messages]
    for message in made:
        if calls := message.pop("tool_calls", None):
            texts = [
                json.dumps({"name": call["function"]["name"], ARGUMENT_KEYS[form]: call["function"]["arguments"]})
                for call in calls
            ]
            texts = [f"{OPEN}\n{text}\n{CLOSE}" for text in texts] if form == "hermes" else texts
            message["content"] = "\n".join([message["content"], *texts] if message["content"] else texts)
        if message["role"] == "tool":
            message["role"] = "user"
    if tools:
        told = f"{json.dumps(tools, ensure_ascii=False)}\n{PLAIN_PROMPTS[form] if prompt is None else prompt}"
        last = next((message for message in reversed(made) if message["role"] == "user"), None)
        if last is None:
            made.insert(0, {"role": "system", "content": told})
        else:
            last["content"] += f"\n---\n{told}"
    return made


@dataclass(frozen=True)
class Delta:
    """More content, or more arguments, as the model wrote them, of call number `call`; its first delta has the name."""

    content: str = ""
    call: int | None = None
    name: str | None = None
    arguments: str = ""


class _NoCall(Exception):  # noqa: N818
    """The text is not a tool call."""


class ToolParser:
    """Takes an answer's text piece by piece. `form` is one of TOOL_FORMATS; raises ConfigError for another.

    A call is returned once its name is one of `names` and its arguments have begun; then its arguments are returned as
    they come, valid JSON or not. Until then the text is held back; if it is not a call, it becomes content as written.
    White space around calls is dropped; without calls, nothing is.

    Generators read the text and wait for more. What they skip goes to the current sink: held back, content or a call's
    arguments.
    """

    def __init__(self, form: str, names: Collection[str]) -> None:
        check_format(form)
        self.calls = 0
        self._names = frozenset(names)
        self._deltas: list[Delta] = []
        self._content: list[str] = []  # the next delta's
        self._held: list[str] = []
        self._sink: Callable[[str], object] = self._held.append
        self._text = ""
        self._begin = self._at = 0  # what the sink has not got yet, and the next character to read
        self._ended = False
        self._steps = self._hermes() if form == "hermes" else self._llama()
        next(self._steps)

    def push(self, text: str) -> list[Delta]:
        self._text, self._begin, self._at = text, 0, 0
        next(self._steps, None)
        return self._take_deltas()

    def finish(self) -> list[Delta]:
        """Deltas for what was held back. Nothing may be pushed after it."""
        self._ended = True
        return self.push("")

    def _llama(self) -> Generator[None]:
        """Calls at the beginning of the text, or none."""
        yield from self._skip(_SPACE)
        while (yield from self._peek()) == "{" and (yield from self._call()):
            yield from self._skip(_BETWEEN)
        if not self.calls or (yield from self._peek()) or _BETWEEN.sub("", "".join(self._held)):
            self._release()
        self._set_sink(self._content.append)
        while (yield from self._peek()):
            self._at = len(self._text)

    def _hermes(self) -> Generator[None]:
        """Calls anywhere, each between two markers. The second may be missing."""
        bare = True  # nothing but white space since the last call or the beginning
        while (yield from self._peek()):
            if bare:
                yield from self._skip(_SPACE)
            marker = yield from self._marker()
            if marker == CLOSE and bare and self.calls:
                self._drop()
            elif marker == OPEN and (yield from self._call()):
                bare = True
            elif bare and self.calls and not (yield from self._peek()) and self._only_closes():
                self._drop()
            else:
                self._release()
                self._set_sink(self._content.append)
                yield from self._skip(_TO_MARKER)
                self._set_sink(self._held.append)
                bare = False

    def _only_closes(self) -> bool:
        return CLOSE.startswith("".join(self._held).strip(" \t\r\n"))

    def _marker(self) -> Generator[None, None, str]:
        """The marker here, or ""; a part of a marker is skipped."""
        read = ""
        while read not in (OPEN, CLOSE):
            read += yield from self._peek()
            if self._at == len(self._text) or not (OPEN.startswith(read) or CLOSE.startswith(read)):
                return ""
            self._at += 1
        return read

    def _call(self) -> Generator[None, None, bool]:
        """Read a call. Whether any of it was returned; if not, all of it is held back."""
        before = self.calls
        with suppress(_NoCall):
            yield from self._object()
        self._set_sink(self._held.append)
        if self.calls == before:
            return False
        self._held.clear()
        return True

    def _object(self) -> Generator[None]:
        """A call's object. Members after the arguments are skipped."""
        name = arguments = None
        given = False
        yield from self._skip(_SPACE)
        yield from self._expect("{")
        while True:
            key = yield from self._key()
            if given or key not in ("name", *_ARGUMENTS):
                yield from self._value()
            elif key == "name":
                name = yield from self._name()
            elif (yield from self._peek()) != "{":
                raise _NoCall
            elif name is None:
                arguments = yield from self._read(self._value())
            else:
                given = True
                self._set_sink(self._begin_call(name))
                yield from self._value()
                self._set_sink(self._held.append)
            if not given and name is not None and arguments is not None:
                given = True
                _decode(arguments)
                self._begin_call(name)(arguments)
            yield from self._skip(_SPACE)
            if (yield from self._peek()) != ",":
                break
            yield from self._expect(",")
        yield from self._expect("}")

    def _key(self) -> Generator[None, None, object]:
        """A member's key, up to its value."""
        yield from self._skip(_SPACE)
        key = yield from self._read(self._string())
        yield from self._skip(_SPACE)
        yield from self._expect(":")
        yield from self._skip(_SPACE)
        return _decode(key)

    def _name(self) -> Generator[None, None, str]:
        name = _decode((yield from self._read(self._string())))
        if name not in self._names:
            raise _NoCall
        return str(name)

    def _value(self) -> Generator[None]:
        """Skip a JSON value; only its brackets and strings are checked."""
        depth = 0
        while True:
            character = yield from self._peek()
            if character == '"':
                yield from self._string()
            elif character in ("{", "["):
                depth += 1
                self._at += 1
            elif character in ("}", "]") and depth:
                depth -= 1
                self._at += 1
            elif not (yield from self._skip(_IN_VALUE if depth else _SCALAR)):
                raise _NoCall
            if not depth:
                return

    def _string(self) -> Generator[None]:
        yield from self._expect('"')
        while True:
            yield from self._skip(_IN_STRING)
            if (yield from self._peek()) != "\\":
                break
            self._at += 1
            yield from self._expect((yield from self._peek()))
        yield from self._expect('"')

    def _read(self, steps: Generator[None]) -> Generator[None, None, str]:
        """The text that some steps skip, which is held back."""
        self._flush()
        start = len(self._held)
        yield from steps
        self._flush()
        return "".join(self._held[start:])

    def _peek(self) -> Generator[None, None, str]:
        """The next character; "" at the end of the answer."""
        while self._at == len(self._text):
            self._flush()
            if self._ended:
                return ""
            yield
        return self._text[self._at]

    def _skip(self, run: re.Pattern[str]) -> Generator[None, None, bool]:
        """Skip what a pattern matches here. Whether there was any."""
        found = False
        while (yield from self._peek()) and (match := run.match(self._text, self._at)):
            self._at = match.end()
            found = True
        return found

    def _expect(self, character: str) -> Generator[None]:
        if not character or (yield from self._peek()) != character:
            raise _NoCall
        self._at += 1

    def _set_sink(self, sink: Callable[[str], object]) -> None:
        self._flush()
        self._sink = sink

    def _flush(self) -> None:
        if self._begin < self._at:
            self._sink(self._text[self._begin : self._at])
            self._begin = self._at

    def _release(self) -> None:
        self._flush()
        self._content.extend(self._held)
        self._held.clear()

    def _drop(self) -> None:
        self._flush()
        self._held.clear()

    def _begin_call(self, name: str) -> Callable[[str], object]:
        """Return a call's name in a delta; the result is the sink of its arguments."""
        call = self.calls
        self.calls += 1
        self._end_content()
        self._deltas.append(Delta(call=call, name=name))
        return lambda piece: self._deltas.append(Delta(call=call, arguments=piece))

    def _end_content(self) -> None:
        if self._content:
            self._deltas.append(Delta(content="".join(self._content)))
            self._content.clear()

    def _take_deltas(self) -> list[Delta]:
        self._end_content()
        deltas, self._deltas = self._deltas, []
        return deltas


def _decode(raw: str) -> object:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise _NoCall from None
