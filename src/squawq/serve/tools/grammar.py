"""Tool calls as grammars: which of two formats a chat template teaches, and the grammar that holds an answer to it.

A schema is untrusted: it enters a grammar as JSON only, and the compiler checks the rest.
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
from squawq.text.tokenizer import Tokenizer

TOOL_FORMATS = ("llama3_json", "hermes")
OPEN, CLOSE = "<tool_call>", "</tool_call>"
CALL_SPACE = r"[\x20\n]"  # between a call's JSON tokens, once: models write calls in one line, and small ones get lost
PLAIN_FORMAT = "llama3_json"  # of calls, where the template knows no tools
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_MODES = ("auto", "required", "none")  # tool_choice has one name space for these and for functions
_SHAPES = ("properties", "patternProperties", "additionalProperties", "$ref", "allOf", "anyOf", "oneOf")
ARGUMENT_KEYS = {"llama3_json": "parameters", "hermes": "arguments"}


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
    """A new id of a tool call."""
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
        raise ConfigError(f"tool_choice is {choice!r:.80}; choose auto, required or one of {_listed(functions)}")
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
        rules.append(f"arguments_{i}: %json {_schema(name, functions[name])}")
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
    """The functions by name, validated."""
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


def _schema(name: str, function: Mapping[str, Any]) -> str:
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
    """A JSON schema, or its text, for %json in a Lark grammar.

    Args:
        schema: The schema.
        space: Regex of the white space between JSON tokens.

    Raises:
        ConfigError: It is not JSON, too deeply nested, or cannot be closed to additional properties.
    """
    try:
        closed = close_objects(json.loads(schema) if isinstance(schema, str) else schema)
        closed = closed if isinstance(closed, dict) else {"allOf": [closed]}
        return json.dumps({**closed, "x-guidance": {"whitespace_pattern": space}}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the schema is refused: {error}") from error


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names)[:300]
