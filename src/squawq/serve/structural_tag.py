"""vLLM's and xgrammar's structural tags: free text with tags that hold JSON of a schema, each begun by its trigger.

Pure: knows no HTTP and no engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from squawq.engine.request import Grammar
from squawq.errors import ConfigError
from squawq.serve.tools import embedded, other_tokens

MAX_TAGS = 128


def structural_tag(form: Mapping[str, Any], added: Mapping[str, int]) -> Grammar:
    """The grammar of {"structures": [{"begin", "schema", "end"}], "triggers": [...]}, or of {"format": ...} with a
    format of the type triggered_tags.

    added: `tools.added_tokens` of the model's tokenizer. Raises ConfigError.
    """
    tags, triggers = _legacy(form) if "format" not in form else _triggered(form["format"])
    if not isinstance(triggers, list) or not 0 < len(triggers) <= MAX_TAGS or not all(map(_text, triggers)):
        raise ConfigError(f"triggers must be a list of 1 to {MAX_TAGS} texts")
    if not 0 < len(tags) <= MAX_TAGS:
        raise ConfigError(f"a structural tag has 1 to {MAX_TAGS} tags; got {len(tags)}")
    bodies: dict[str, list[str]] = {}
    rules = []
    for number, (begin, schema, end) in enumerate(tags):
        trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
        if trigger is None:
            raise ConfigError(f"the tag that begins with {begin!r:.80} has no trigger; its beginning must have one")
        bodies.setdefault(trigger, []).append(f"body_{number}")
        words = [_word(begin[len(trigger) :], added), f"json_{number}", _word(end, added)]
        rules.append(f"body_{number}: " + " ".join(filter(None, words)))
        rules.append(f"json_{number}: %json {embedded(schema)}")
    others = other_tokens(added, without=bodies)
    text = f"text: (TEXT{f' | {others}' if others else ''})*"
    rules += [text, "TEXT: /(?s:.+)/", "start: (" + " | ".join(f"part_{i}" for i in range(len(bodies))) + ")* text"]
    for number, (trigger, names) in enumerate(bodies.items()):
        lead = f"lead_{number}" if trigger not in added else f"(lead_{number} | text <[{added[trigger]}]>)"
        rules.append(f"part_{number}: {lead} ({' | '.join(names)})")
        rules.append(f"lead_{number}[lazy]: /(?s:.*){_escaped(trigger)}/")
    return Grammar("lark", "\n".join(rules) + "\n")


def _legacy(form: Mapping[str, Any]) -> tuple[list[tuple[str, Any, str]], Any]:
    structures = form.get("structures")
    tags = [(tag.get("begin"), tag.get("schema"), tag.get("end", "")) for tag in _objects(structures, "structures")]
    return _checked(tags), form.get("triggers")


def _triggered(form: Any) -> tuple[list[tuple[str, Any, str]], Any]:
    if not isinstance(form, Mapping) or form.get("type") != "triggered_tags":
        raise ConfigError("format must be an object of the type triggered_tags; other types are not supported")
    for name in ("at_least_one", "stop_after_first", "excludes"):
        if form.get(name):
            raise ConfigError(f"format: {name} is not supported")
    tags = []
    for tag in _objects(form.get("tags"), "tags"):
        content = tag.get("content")
        if not isinstance(content, Mapping) or content.get("type") != "json_schema":
            raise ConfigError("a tag's content must be of the type json_schema; other types are not supported")
        tags.append((tag.get("begin"), content.get("json_schema"), tag.get("end", "")))
    return _checked(tags), form.get("triggers")


def _objects(value: Any, name: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise ConfigError(f"{name} must be a list of objects")
    return value


def _checked(tags: list[tuple[Any, Any, Any]]) -> list[tuple[str, Any, str]]:
    for begin, schema, end in tags:
        if not _text(begin) or not isinstance(end, str) or not isinstance(schema, Mapping):
            raise ConfigError("a tag must have begin, a text, a JSON schema, and end, a text")
    return tags


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _word(text: str, added: Mapping[str, int]) -> str:
    """A text in a Lark rule, by its token where it is one; "" for none."""
    return f"<[{added[text]}]>" if text in added else text and json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """A text in a Lark regex, which must stay in its line and between its slashes."""
    return "".join(
        character if re.fullmatch(r"[\w ]", character, re.ASCII) else f"\\x{{{ord(character):x}}}" for character in text
    )
