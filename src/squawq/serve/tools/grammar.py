"""The grammars that hold an answer to tool calls or structured outputs.

Tool calls have one of two formats, as the chat template teaches. Structured outputs are OpenAI's and TGI's
response_format, vLLM's structured_outputs and structural tags, and TGI's grammar. A schema is untrusted: it enters a
grammar as JSON only, and the engine checks whether the grammar compiles.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Container, Mapping, Sequence
from typing import Any

from squawq.engine.grammar import SPACE
from squawq.engine.request import Grammar
from squawq.engine.schema import close_objects
from squawq.errors import ConfigError
from squawq.serve.errors import ApiError
from squawq.text.tokenizer import Tokenizer

TOOL_FORMATS = ("llama3_json", "hermes")
OPEN, CLOSE = "<tool_call>", "</tool_call>"
CALL_SPACE = r"[\x20\n]"  # between a call's JSON tokens, once: models write calls in one line, and small ones get lost
PLAIN_FORMAT = "llama3_json"  # of calls, where the template knows no tools
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_MODES = ("auto", "required", "none")  # tool_choice has one name space for these and for functions
_SHAPES = ("properties", "patternProperties", "additionalProperties", "$ref", "allOf", "anyOf", "oneOf")
ARGUMENT_KEYS = {"llama3_json": "parameters", "hermes": "arguments"}
ANY_OBJECT = {"type": "object"}
FORMATS = ("text", "json_object", "json_schema", "json", "regex", "structural_tag")
TGI_FORMATS = FORMATS[1:5]
OUTPUTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
OPTIONS = {"disable_additional_properties": True, "disable_any_whitespace": False, "disable_fallback": None}
_GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
MAX_TAGS = 128


def tool_format(template: str | None) -> str | None:
    """The format, one of TOOL_FORMATS, that a chat template teaches; None where it knows no tools or another format."""
    template = template or ""
    if OPEN in template and not ("<function=" in template or "<arg_key>" in template):  # those write XML inside
        return "hermes"
    teaches = re.search(r"\btools\b", template) and '"parameters"' in template and OPEN not in template
    return "llama3_json" if teaches else None


def template_supports_tools(template: str | None) -> bool:
    """Whether a chat template uses the tools, in any format."""
    return re.search(r"\btools\b", template or "") is not None


def added_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """A tokenizer's added tokens that are not special but look like tags, such as Qwen's <tool_call> and <think>.

    llguidance treats every added token <...> as special, which text in a grammar does not match; so grammars must name
    them.
    """
    added = tokenizer.fast.get_added_tokens_decoder()
    return {
        token.content: index
        for index, token in added.items()
        if not token.special and token.content.startswith("<") and token.content.endswith(">")
    }


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def tool_grammar(
    form: str,
    tools: Sequence[Mapping[str, Any]],
    choice: str,
    parallel: bool,
    added: Mapping[str, int] | None = None,
    answer: Grammar | None = None,
) -> Grammar:
    """The grammar of an answer with tool calls.

    Args:
        form: One of TOOL_FORMATS.
        tools: OpenAI's.
        choice: "required": calls; "auto": calls or free text, which may precede them in hermes; or a function's name:
            one call of it.
        parallel: More than one call is allowed.
        added: `added_tokens` of the model's tokenizer.
        answer: A JSON schema's grammar in place of free text.

    Raises:
        ConfigError: A tool is invalid, or `choice` names none.
    """
    check_format(form)
    functions = _functions(tools)
    if choice not in _MODES and choice not in functions:
        raise ConfigError(
            f"tool_choice is {choice!r:.80}; choose auto, required or one of {', '.join(functions)[:300]}"
        )
    chosen = list(functions) if choice in _MODES else [choice]
    many = parallel and choice in _MODES
    added = added or {}
    free = choice == "auto" and answer is None
    rules = _hermes_rules(free, many, added) if form == "hermes" else _llama_rules(free, many, added)
    if answer is not None:
        if answer.kind != "json_schema":
            raise ConfigError("Grammar and tools are mutually exclusive, but for JSON schemas")
        rules[0] = rules[0].replace("start: ", "start: answer | ", 1)
        rules.append(f"answer: %json {embedded(answer.text)}")
    rules.append(f"WS: /{CALL_SPACE}/")
    rules.append("object: (" + " | ".join(f"call_{i}" for i in range(len(chosen))) + ') WS? "}"')
    for i, name in enumerate(chosen):
        words = ["{", '"name"', ":", f'"{name}"', ",", f'"{ARGUMENT_KEYS[form]}"', ":"]
        head = " WS? ".join(json.dumps(word) for word in words)  # no terminal: it would take an answer's characters
        rules.append(f"call_{i}: {head} WS? arguments_{i}")
        rules.append(f"arguments_{i}: %json {_arguments_schema(name, functions[name])}")
    return Grammar("lark", "\n".join(rules) + "\n")


def check_format(form: str) -> None:
    """Raise ConfigError for a format that is not one of TOOL_FORMATS."""
    if form not in TOOL_FORMATS:
        raise ConfigError(f"the tool format is {form!r:.80}; choose one of {', '.join(TOOL_FORMATS)}")


def _hermes_rules(free: bool, many: bool, added: Mapping[str, int]) -> list[str]:
    """`first` is the first call where text may stand before it; LAZY ends at the first marker that is spelt out."""
    opening, closing = (f"<[{added[mark]}]>" if mark in added else json.dumps(mark) for mark in (OPEN, CLOSE))
    rules = [f"body: WS? object WS? {closing}", f"call: {opening} body"]
    more = " (WS? call)*" if many else ""
    if not free:
        return [f"start: call{more}", *rules]
    return [
        f"start: text | text first{more}",
        f"text: ({_either('TEXT', other_tokens(added, without=(OPEN,)))})*",
        "TEXT: /(?s:.+)/",
        f"first: ({_either('lazy', opening if OPEN in added else '')}) body",
        f"lazy[lazy]: /(?s:.*){OPEN}/",
        *rules,
    ]


def _llama_rules(free: bool, many: bool, added: Mapping[str, int]) -> list[str]:
    """A call starts at the answer's first character that is not white space; otherwise the answer is text."""
    calls = "calls: object" + (r" (/;[ \n]?|\n/ object)*" if many else "")
    if not free:
        return ["start: calls", calls]
    others = other_tokens(added, without=(OPEN,))
    begin = _either("FIRST", others and f"LEAD? {others}")
    return [
        f"start: LEAD? | LEAD? calls | ({begin}) ({_either('TEXT', others)})*",
        calls,
        r"LEAD: /[ \t\r\n]+/",
        r"FIRST: /[ \t\r\n]*[^ \t\r\n{](?s:.*)/",
        "TEXT: /(?s:.+)/",
    ]


def other_tokens(added: Mapping[str, int], without: Container[str]) -> str:
    """The other added tokens, as an alternative in a Lark rule; "" for none."""
    ids = ",".join(str(index) for mark, index in sorted(added.items()) if mark not in without)
    return ids and f"<[{ids}]>"


def _either(*rules: str) -> str:
    return " | ".join(rule for rule in rules if rule)


def _functions(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    functions: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool["function"]
        name = function["name"]
        if not _NAME.fullmatch(name) or name in _MODES:
            raise ConfigError(
                f"a function is called {name!r:.80}; a name has 1 to 64 of a-z, A-Z, 0-9, _, . and -, "
                f"and is not {' or '.join(_MODES)}"
            )
        if name in functions:
            raise ConfigError(f"two functions are called {name!r}; give each a name of its own")
        functions[name] = function
    if not functions:
        raise ConfigError("tools is empty; give at least one function")
    return functions


def _arguments_schema(name: str, function: Mapping[str, Any]) -> str:
    """The JSON schema of a function's arguments. It stays a root, so that its references are valid."""
    schema = function.get("parameters")
    schema = {} if schema is None else schema
    if isinstance(schema, Mapping) and not any(key in schema for key in _SHAPES):
        schema = {**schema, "properties": {}}  # a function without arguments
    kind = schema.get("type", "object") if isinstance(schema, Mapping) else None
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise ConfigError(f"the parameters of {name!r} must be the JSON schema of an object; the type is {kind!r:.80}")
    try:
        return embedded({**schema, "type": "object"}, CALL_SPACE)
    except ConfigError as error:
        raise ConfigError(f"the parameters of {name!r}: {error}") from error


def embedded(schema: Any, space: str = SPACE) -> str:
    """A JSON schema, or its text, for %json in a Lark grammar. space: regex of the white space between JSON tokens.

    Raises ConfigError if it is not JSON, too deeply nested, or cannot be closed to additional properties.
    """
    try:
        closed = close_objects(json.loads(schema) if isinstance(schema, str) else schema)
        closed = closed if isinstance(closed, dict) else {"allOf": [closed]}
        return json.dumps({**closed, "x-guidance": {"whitespace_pattern": space}}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the schema is refused: {error}") from error


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
