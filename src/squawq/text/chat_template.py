"""Renders a chat template with jinja2: messages to the text that a model was trained to read.

A template comes with a downloaded model and is untrusted: it runs in jinja2's sandbox, inside a child process with
limits on memory, time and files (squawq.text.template_process). Nothing else calls `render`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from squawq.errors import ConfigError, TemplateError

RESERVED = ("messages", "tools", "add_generation_prompt")
MAX_MESSAGE = 500  # characters of a template's own error that are passed on
_END = "ContinueFromHere\u2003"  # a template that trims texts takes the last character away, a space


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    generation_prompt: bool = True,
    continue_final: bool = False,
    variables: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> str:
    """Render a chat. Messages are plain JSON values; keys whose value is None are left out.

    Args:
        generation_prompt: Append the prompt for the assistant's answer.
        continue_final: End with the text of the last message, to be continued, without a generation prompt.
        variables: Further template variables, such as bos_token.
        now: The date that some templates print.

    Raises:
        ConfigError: The template refuses the chat, or the last message cannot be continued.
        TemplateError: The template takes too much memory.
    """
    given = dict(variables or {})
    if taken := [name for name in RESERVED if name in given]:
        raise ConfigError(f"template variables must not be named {', '.join(RESERVED)}; got {', '.join(taken)}")
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    final = _mark_end(chat) if continue_final else ""
    context = {
        "strftime_now": lambda form: (now or datetime.now()).strftime(form),
        **given,
        "messages": chat,
        "tools": tools,
        "add_generation_prompt": generation_prompt and not continue_final,
    }
    try:
        text = _compile(template).render(context)
    except MemoryError as error:
        raise TemplateError("the chat template ran out of memory") from error
    except Exception as error:  # a template is a program: it can fail in any way
        reason = (str(error) or type(error).__name__)[:MAX_MESSAGE]
        raise ConfigError(f"the chat template refuses these messages: {reason}") from error
    return _cut(text, final) if continue_final else text


def _mark_end(chat: list[dict[str, Any]]) -> str:
    """Put _END behind the last message's text, in place, and return that text without it."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        chat[-1]["content"] = content + _END
        return content
    parts = list(content) if isinstance(content, Sequence) else []
    for index, part in reversed(list(enumerate(parts))):
        if isinstance(part, Mapping) and isinstance(text := part.get("text"), str):
            parts[index] = {**part, "text": text + _END}
            chat[-1]["content"] = parts
            return text
    raise ConfigError("the last message has no text; there is nothing to continue")


def _cut(text: str, final: str) -> str:
    """The text up to the mark; without the final message's last spaces where the template trims them."""
    place = text.rfind(_END.rstrip())
    if place < 0:
        raise ConfigError("the chat template leaves the last message's text out; it cannot be continued")
    kept = text[:place]
    if text.startswith(_END, place) or not final.strip():
        return kept
    return kept.removesuffix(final[len(final.rstrip()) :])


class _GenerationTag(jinja2.ext.Extension):
    """The tag {% generation %}, which marks the assistant's tokens for training; ignored here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' templates expect it; jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)  # compiling takes a hundred times as long as rendering
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _tojson
    return environment.from_string(template)


def load(_: bytes) -> Callable[[bytes], bytes]:
    """The child's handler (squawq.text.child): JSON of `render`'s arguments to {"text"} or {"error"}.

    An error's "limit" tells a template that exceeded its limits from one that refused the chat.
    """
    with contextlib.suppress(ConfigError):  # what is imported late must be imported before files are given up
        render("{{ strftime_now('%c') }}{{ raise_exception('') }}", [])
    return _answer


def _answer(message: bytes) -> bytes:
    try:
        request = json.loads(message)
        now = request.pop("now")
        text = render(**request, now=now and datetime.fromisoformat(now))
        return json.dumps({"text": text}).encode()
    except ConfigError as error:
        reply = {"error": str(error), "limit": isinstance(error, TemplateError)}
    except MemoryError:  # the request or the reply is too large
        reply = {"error": "the chat template ran out of memory", "limit": True}
    return json.dumps(reply).encode()
