"""What an answer must match, in every form in which it is asked for: OpenAI's and TGI's response_format (which
huggingface_hub's client sends), vLLM's structured_outputs, TGI's grammar. JSON in, the engine's Grammar out.

Knows no tokenizer; whether a grammar compiles is the engine's check.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from squawq.engine.request import Grammar
from squawq.errors import ConfigError
from squawq.serve.errors import ApiError

ANY_OBJECT = {"type": "object"}
FORMATS = ("text", "json_object", "json_schema", "json", "regex")
OUTPUTS = ("json", "regex", "choice", "grammar", "json_object")


def response_grammar(response: Mapping[str, Any] | None, outputs: Mapping[str, Any] | None) -> Grammar | None:
    """The grammar of response_format or structured_outputs; None for free text. Raises ApiError."""
    if response is not None and outputs is not None:
        raise ApiError(
            "invalid", "response_format and structured_outputs are both given; choose one", "response_format"
        )
    if response is not None:
        return _response(response)
    return None if outputs is None else _outputs(outputs)


def tgi_grammar(value: Mapping[str, Any]) -> Grammar:
    """TGI's {"type": "json" | "json_object" | "json_schema" | "regex", "value": ...}. Raises ApiError."""
    kind = value.get("type")
    if kind not in FORMATS[1:] or "value" not in value:
        raise ApiError("invalid", f"grammar needs a type, one of {', '.join(FORMATS[1:])}, and a value", "grammar")
    grammar = _response(value)
    assert grammar is not None
    return grammar


def _response(form: Mapping[str, Any]) -> Grammar | None:
    kind, where = form.get("type"), "response_format"
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


def _outputs(form: Mapping[str, Any]) -> Grammar:
    where = "structured_outputs"
    given = {name: value for name, value in form.items() if value is not None and value is not False}
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
    return _grammar("lark" if kind == "grammar" else "regex", value, where)


def _schema(value: Any, where: str) -> Grammar:
    """A JSON schema, as an object or as its JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ApiError("invalid", f"{where}: the schema is not JSON: {error}", where) from error
    if not isinstance(value, Mapping):
        raise ApiError("invalid", f"{where}: the schema must be a JSON object", where)
    try:
        return _grammar("json_schema", json.dumps(value, allow_nan=False), where)
    except (ValueError, RecursionError) as error:
        raise ApiError("invalid", f"{where}: the schema is refused: {error}", where) from error


def _grammar(kind: str, text: Any, where: str) -> Grammar:
    try:
        return Grammar(kind, text)
    except ConfigError as error:
        raise ApiError("invalid", f"{where}: {error}", where) from error
