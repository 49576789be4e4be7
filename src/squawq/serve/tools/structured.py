"""Structured outputs as the engine's Grammar: OpenAI's and TGI's response_format, vLLM's structured_outputs and
structural tags, TGI's grammar. The engine checks whether a grammar compiles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from squawq.engine.request import Grammar
from squawq.errors import ConfigError
from squawq.serve.errors import ApiError
from squawq.serve.tools.grammar import embedded, other_tokens

ANY_OBJECT = {"type": "object"}
FORMATS = ("text", "json_object", "json_schema", "json", "regex", "structural_tag")
TGI_FORMATS = FORMATS[1:5]
OUTPUTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
OPTIONS = {"disable_additional_properties": True, "disable_any_whitespace": False, "disable_fallback": None}
_GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


def response_grammar(
    response: Mapping[str, Any] | None, outputs: Mapping[str, Any] | None, added: Mapping[str, int]
) -> Grammar | None:
    """The grammar of response_format or structured_outputs; None for free text. Raises ApiError.

    added: `grammar.added_tokens` of the model's tokenizer, which a structural tag may name.
    """
    if response is not None and outputs is not None:
        raise ApiError(
            "invalid", "response_format and structured_outputs are both given; choose one", "response_format"
        )
    if response is not None:
        return _response(response, added)
    return None if outputs is None else _outputs(outputs, added)


def tgi_grammar(value: Mapping[str, Any]) -> Grammar:
    """TGI's {"type": "json" | "json_object" | "json_schema" | "regex", "value": ...}. Raises ApiError."""
    kind = value.get("type")
    if kind not in TGI_FORMATS or "value" not in value:
        raise ApiError("invalid", f"grammar needs a type, one of {', '.join(TGI_FORMATS)}, and a value", "grammar")
    grammar = _response(value, {})
    assert grammar is not None
    return grammar


def _response(form: Mapping[str, Any], added: Mapping[str, int]) -> Grammar | None:
    kind, where = form.get("type"), "response_format"
    if kind == "structural_tag":
        return _tags(form, added, where)
    if surplus := sorted(set(form) - {"type", "value", "schema", "json_schema"}):
        raise ApiError("invalid", f"{where}: {surplus[0]!r:.40} is not supported", where)
    if kind == "text":
        return None
    if kind == "regex":
        return _grammar("regex", form.get("value"), where)
    if kind in ("json_object", "json"):
        return _schema(form.get("value", form.get("schema", ANY_OBJECT)), where)
    if kind == "json_schema":
        outer = form.get("json_schema", form.get("value"))
        if not isinstance(outer, Mapping) or "schema" not in outer:
            raise ApiError("invalid", f"{where}: json_schema must be an object with a schema", where)
        return _schema(outer["schema"], where)
    shown = str(kind)[:40]
    raise ApiError("invalid", f"{where}: the type is {shown!r}; choose one of {', '.join(FORMATS)}", where)


def _outputs(form: Mapping[str, Any], added: Mapping[str, int]) -> Grammar:
    where = "structured_outputs"
    given = {name: value for name, value in form.items() if value is not None and value is not False}
    given = {name: value for name, value in given.items() if name not in OPTIONS or value != OPTIONS[name]}
    if len(given) != 1 or not set(given) <= set(OUTPUTS):
        raise ApiError("invalid", f"{where} takes exactly one of {', '.join(OUTPUTS)}", where)
    ((kind, value),) = given.items()
    if kind == "json":
        return _schema(value, where)
    if kind == "json_object":
        return _schema(ANY_OBJECT, where)
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            raise ApiError("invalid", f"{where}: choice must be a list of texts", where)
        return _grammar("lark", "start: " + " | ".join(json.dumps(item, ensure_ascii=False) for item in value), where)
    if kind == "structural_tag":
        return _tags(_object(value, where, "structural_tag"), added, where)
    if kind == "grammar" and isinstance(value, str) and _GBNF.search(value):
        return _grammar("gbnf", value, where)
    return _grammar("lark" if kind == "grammar" else "regex", value, where)


def _tags(form: Mapping[str, Any], added: Mapping[str, int], where: str) -> Grammar:
    try:
        return structural_tag(form, added)
    except ConfigError as error:
        raise ApiError("invalid", f"{where}: {error}", where) from error


def _schema(value: Any, where: str) -> Grammar:
    """A JSON schema, as an object or as its JSON text."""
    try:
        return _grammar("json_schema", json.dumps(_object(value, where, "schema"), allow_nan=False), where)
    except (ValueError, RecursionError) as error:
        raise ApiError("invalid", f"{where}: the schema is refused: {error}", where) from error


def _object(value: Any, where: str, what: str) -> Mapping[str, Any]:
    """A JSON object, or its text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ApiError("invalid", f"{where}: the {what} is not JSON: {error}", where) from error
    if not isinstance(value, Mapping):
        raise ApiError("invalid", f"{where}: the {what} must be a JSON object", where)
    return value


def _grammar(kind: str, text: Any, where: str) -> Grammar:
    try:
        return Grammar(kind, text)
    except ConfigError as error:
        raise ApiError("invalid", f"{where}: {error}", where) from error


MAX_TAGS = 128


def structural_tag(form: Mapping[str, Any], added: Mapping[str, int]) -> Grammar:
    """The grammar of {"structures": [{"begin", "schema", "end"}], "triggers": [...]}, or of {"format": ...} with a
    format of the type triggered_tags.

    added: `grammar.added_tokens` of the model's tokenizer. Raises ConfigError.
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
    """A text in a Lark rule, as a token if it is one; "" for an empty text."""
    return f"<[{added[text]}]>" if text in added else text and json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """A text in a Lark regex, which must stay in its line and between its slashes."""
    return "".join(
        character if re.fullmatch(r"[\w ]", character, re.ASCII) else f"\\x{{{ord(character):x}}}" for character in text
    )
