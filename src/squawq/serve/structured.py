"""What an answer must match, in every form in which it is asked for: OpenAI's and TGI's response_format (which
huggingface_hub's client sends), vLLM's structured_outputs and structural tags, TGI's grammar. JSON in, the engine's
Grammar out. Whether a grammar compiles is the engine's check.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from squawq.engine.request import Grammar
from squawq.errors import ConfigError
from squawq.serve.errors import ApiError
from squawq.serve.structural_tag import structural_tag

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

    added: `tools.added_tokens` of the model's tokenizer, which a structural tag may name.
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
