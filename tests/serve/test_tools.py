"""Calls of functions: the grammar lets through what the parser reads, and a text split anywhere reads the same."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from squawq.demo import demo_model
from squawq.engine.grammar import GrammarCompiler, Matcher
from squawq.engine.request import Grammar
from squawq.errors import ConfigError
from squawq.serve.openai.chat import template_messages
from squawq.serve.tools.grammar import (
    CLOSE,
    OPEN,
    TOOL_FORMATS,
    added_tokens,
    call_id,
    structural_tag,
    tool_format,
    tool_grammar,
)
from squawq.serve.tools.parser import PLAIN_PROMPTS, Delta, ToolParser, plain_messages
from squawq.text.tokenizer import Tokenizer

LLAMA_TEMPLATE = Path(__file__).parents[3] / "shared/data/llama3-chat-template/meta-llama-Llama-3.1-8B-Instruct.jinja"
EOS = 4
VOCAB = 4104
KEYS = {"llama3_json": "parameters", "hermes": "arguments"}
SEPARATORS = {"llama3_json": "; ", "hermes": "\n"}
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "unit": {"$ref": "#/$defs/unit"}},
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["C", "F"]}},
}


def parse(form: str, names: Collection[str], text: str) -> tuple[str, list[tuple[str, str]]]:
    """Parse a complete answer: its content, and each call's function and arguments."""
    parser = ToolParser(form, names)
    content: list[str] = []
    found: list[tuple[str, list[str]]] = []
    for delta in parser.push(text) + parser.finish():
        content.append(delta.content)
        if delta.name is not None:
            found.append((delta.name, []))
        if delta.call is not None:
            found[delta.call][1].append(delta.arguments)
    return "".join(content), [(name, "".join(pieces)) for name, pieces in found]


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    schema = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, **schema}}


TOOLS = [
    tool("weather", WEATHER),
    tool("time.now-2", {"additionalProperties": True}),
    tool("f", {"properties": {"x": {"type": "integer"}}}),
]
NAMES = ["weather", "time.now-2", "f"]
DEEP: dict[str, Any] = {}
for _ in range(100_000):
    DEEP = {"items": DEEP}
MANY: dict[str, Any] = {"allOf": [{"properties": {f"a{number}": {}}} for number in range(500)]}


def written(form: str, name: str, arguments: str = "{}") -> str:
    """A call as models write it."""
    call = f'{{"name": "{name}", "{KEYS[form]}": {arguments}}}'
    return f"{OPEN}\n{call}\n{CLOSE}" if form == "hermes" else call


def tagged() -> Tokenizer:
    """The demo model's tokenizer with Qwen's added tokens, which are text."""
    tokenizer = Tokenizer(demo_model())
    tags = [OPEN, CLOSE, "<think>", "</think>", "  "]
    tokenizer.fast.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return tokenizer


TOKENIZERS = {"plain": Tokenizer(demo_model()), "tagged": tagged()}
COMPILERS = {kind: GrammarCompiler(tokenizer, VOCAB, [EOS]) for kind, tokenizer in TOKENIZERS.items()}


def accepts(kind: str, form: str, choice: str, text: str, parallel: bool = True, tools: Any = TOOLS) -> bool:
    """Whether the model may write this text, token by token, and end."""
    grammar = tool_grammar(form, tools, choice, parallel, added_tokens(TOKENIZERS[kind]))
    return follows(kind, COMPILERS[kind].compile(grammar), text)


def follows(kind: str, matcher: Matcher, text: str) -> bool:
    for token in TOKENIZERS[kind].encode(text, special=False):
        if not matcher.allowed()[token]:
            return False
        matcher.consume(token)
    return bool(matcher.allowed()[EOS])


def walk(kind: str, form: str, choice: str, seed: int, most: int = 120) -> tuple[str, bool]:
    """Text of random allowed tokens, and whether it came to an end."""
    tokenizer = TOKENIZERS[kind]
    generator = np.random.default_rng(seed)
    matcher = COMPILERS[kind].compile(tool_grammar(form, TOOLS, choice, True, added_tokens(tokenizer)))
    ids: list[int] = []
    for _ in range(most):
        allowed = matcher.allowed()
        if allowed[EOS] and generator.random() < 0.5:
            return tokenizer.decode(ids), True
        ids.append(int(generator.choice(np.flatnonzero(allowed))))
        if ids[-1] == EOS:
            return tokenizer.decode(ids[:-1]), True
        matcher.consume(ids[-1])
    return tokenizer.decode(ids), False


# formats


QWEN_TEMPLATE = (
    "{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>{% endif %}'
    "{%- for message in messages %}<|im_start|>{{ message.role + '\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (None, None),
        ("{{ messages[0].content }}", None),
        ('{{ "parameters" }}', None),
        ("{% for t in tools %}{{ t }}{% endfor %}", None),
        (QWEN_TEMPLATE, "hermes"),
        ("{% if tools %}<tool_call><function=f></function></tool_call>{% endif %}", None),
        ('{% if tools %}{"name": function name, "parameters": dictionary}{% endif %}', "llama3_json"),
    ],
)
def test_the_template_tells_the_format(template: str | None, form: str | None) -> None:
    assert tool_format(template) == form


def test_the_format_of_llamas_template() -> None:
    if not LLAMA_TEMPLATE.is_file():
        pytest.skip(f"{LLAMA_TEMPLATE} is not there")
    assert tool_format(LLAMA_TEMPLATE.read_text(encoding="utf-8")) == "llama3_json"


def test_the_demo_model_knows_no_tools() -> None:
    assert tool_format(TOKENIZERS["plain"].chat_template) is None


def test_call_ids() -> None:
    assert all(re.fullmatch(r"call_[0-9a-f]{24}", call_id()) for _ in range(3))
    assert len({call_id() for _ in range(100)}) == 100


# the grammar


def case(form: str, what: str) -> str:
    city = '{"city": "Oslo", "unit": "C"}'
    weather, now = written(form, "weather", city), written(form, "time.now-2", '{"zone": [1, null]}')
    return {
        "nothing": "",
        "text": 'Good day. {"a": 1} </tool_call> <tool',
        "a call": weather,
        "another call": now,
        "two calls": weather + SEPARATORS[form] + now,
        "compact": written(form, "weather", city).replace(", ", ",").replace(": ", ":").replace("\n", ""),
        "lines": written(form, "weather", json.dumps(json.loads(city), indent=0)),
        "indented": written(form, "weather", json.dumps(json.loads(city), indent=2)),
        "text and a call": "I look.\n\n" + weather,
        "space and a call": "\n\n" + weather,
        "a call and text": weather + " Done.",
        "unknown name": written(form, "wether", city),
        "wrong arguments": written(form, "weather", '{"city": "Oslo", "unit": "K"}'),
        "wrong type": written(form, "f", '{"x": "1"}'),
        "no object": written(form, "time.now-2", "[]"),
        "half a call": weather[: len(weather) // 2],
    }[what]


CALLS = ("a call", "compact", "lines")
ALLOWED = {
    "required": (*CALLS, "another call", "two calls"),
    "weather": CALLS,
    "auto": (*CALLS, "another call", "two calls", "nothing", "text", "text and a call", "space and a call"),
}
WRONG = ("indented", "a call and text", "unknown name", "wrong arguments", "wrong type", "no object", "half a call")
ALL = (*ALLOWED["auto"], *WRONG)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("form", TOOL_FORMATS)
@pytest.mark.parametrize("choice", ALLOWED)
def test_the_grammar_lets_through_good_answers_alone(kind: str, form: str, choice: str) -> None:
    found = {what for what in ALL if accepts(kind, form, choice, case(form, what))}
    assert found == set(ALLOWED[choice])


@pytest.mark.parametrize("form", TOOL_FORMATS)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_one_call_where_they_may_not_be_parallel(form: str, choice: str) -> None:
    assert accepts("plain", form, choice, case(form, "a call"), parallel=False)
    assert not accepts("plain", form, choice, case(form, "two calls"), parallel=False)


@pytest.mark.parametrize("form", TOOL_FORMATS)
@pytest.mark.parametrize(
    ("schema", "answers", "others"),
    [
        ({"properties": {"a": {"type": "null"}}}, ['{"a": null}', "{}"], ["text", '{"b": 1}', ""]),
        ({"properties": {"name": {"type": "string"}}}, ['{"name": "f"}', '{"name": "g"}'], ['{"name": "f", "x": 1}']),
        ({"type": "object"}, ["{}", '{"name": "f", "y": {}}'], ["[]"]),
        ({"type": "array", "items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"const": 1}}}, ["[]", "[1, 1]"], ["[2]"]),
    ],
)
def test_an_answer_in_a_form_instead_of_a_call(form: str, schema: Any, answers: list[str], others: list[str]) -> None:
    grammar = tool_grammar(form, TOOLS, "auto", True, {}, Grammar("json_schema", json.dumps(schema)))
    compiler = COMPILERS["plain"]
    for text, good in (
        *((text, True) for text in (*answers, case(form, "a call"), case(form, "two calls"))),
        *((text, False) for text in others),
    ):
        assert follows("plain", compiler.compile(grammar), text) == good, text
        if text in answers:
            assert parse(form, NAMES, text) == (text, [])


@pytest.mark.parametrize("schema", [MANY, DEEP], ids=["many names", "deep"])
def test_schemas_that_cannot_be_closed_are_refused_wherever_they_stand(schema: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="the schema is refused"):
        structural_tag({"structures": [{"begin": "<f>", "schema": schema}], "triggers": ["<f>"]}, {})


def test_a_form_beside_tools_that_cannot_be_closed_is_refused() -> None:
    with pytest.raises(ConfigError, match="the schema is refused"):
        tool_grammar("hermes", TOOLS, "auto", True, {}, Grammar("json_schema", json.dumps(MANY)))


@pytest.mark.parametrize("form", TOOL_FORMATS)
@pytest.mark.parametrize("space", ["", " ", "\n"])
@pytest.mark.parametrize("more", ["  ", "\n ", "\n\n", "\t", "\r\n"])
def test_a_call_has_one_space_between_its_tokens(form: str, space: str, more: str) -> None:
    words = ["{", '"name"', ":", '"weather"', ",", f'"{KEYS[form]}"', ":", "{", '"city"', ":", '"a"', ",", '"unit"']
    words += [":", '"C"', "}", "}"]

    def call(between: list[str]) -> str:
        text = "".join(map("".join, zip(words, between, strict=True)))
        return f"{OPEN}\n{text}\n{CLOSE}" if form == "hermes" else text

    assert accepts("plain", form, "required", call([space] * (len(words) - 1) + [""]))
    for place in range(len(words) - 1):
        between = [space] * (len(words) - 1) + [""]
        between[place] = more
        assert not accepts("plain", form, "required", call(between)), words[place]


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_a_named_function_is_called_once(form: str) -> None:
    call = case(form, "a call")
    assert not accepts("plain", form, "weather", call + SEPARATORS[form] + call)


def test_a_marker_that_is_a_token_is_written_as_that_token() -> None:
    tokenizer = TOKENIZERS["tagged"]
    grammar = tool_grammar("hermes", TOOLS, "required", True, added_tokens(tokenizer))
    allowed = COMPILERS["tagged"].compile(grammar).allowed()
    assert [tokenizer.decode([int(token)]) for token in np.flatnonzero(allowed)] == [OPEN]


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_other_added_tokens_are_text(form: str) -> None:
    text = "<think>\nA call?\n</think>\n\nNo."
    assert accepts("tagged", form, "auto", text)
    assert parse(form, NAMES, text) == (text, [])


def test_added_tokens_are_those_with_a_tags_form() -> None:
    assert list(added_tokens(TOKENIZERS["tagged"])) == [OPEN, CLOSE, "<think>", "</think>"]
    assert added_tokens(TOKENIZERS["plain"]) == {}


def test_a_marker_spelt_out_begins_a_call_too() -> None:
    tokenizer, compiler = TOKENIZERS["tagged"], COMPILERS["tagged"]
    matcher = compiler.compile(tool_grammar("hermes", TOOLS, "auto", True, added_tokens(tokenizer)))
    for character in "a" + OPEN:
        for token in tokenizer.encode(character, special=False):
            matcher.consume(token)
    assert not matcher.allowed()[tokenizer.encode("x", special=False)[0]]


ESCAPES = ['"', '\\"', "}", "\n", " \n%json {", "/ | #", "//", "start: TEXT", "\\u0022", "'"]


@given(st.lists(st.sampled_from(ESCAPES), max_size=6).map("".join))
@settings(max_examples=40, deadline=None)
def test_a_schema_stays_in_its_place(text: str) -> None:
    schema = {"description": text, "properties": {text: {"const": text}}, "required": [text]}
    tools = [tool("f", {**schema, "additionalProperties": False})]
    assert accepts("plain", "hermes", "required", written("hermes", "f", json.dumps({text: text})), tools=tools)
    assert not accepts("plain", "hermes", "required", written("hermes", "f"), tools=tools)
    assert not accepts("plain", "hermes", "required", "x", tools=tools)


@pytest.mark.parametrize(
    ("parameters", "good"),
    [
        ({}, True),
        ({"type": ["object", "null"]}, True),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"required": ["b"], "properties": {"b": {"type": "string"}}}}}, False),
        ({"anyOf": [{"type": "string"}, {"type": "object"}]}, True),
        ({"x-guidance": {"lenient": True}, "minProperties": 3}, False),
    ],
)
def test_arguments_are_an_object_of_the_schema(parameters: dict[str, Any], good: bool) -> None:
    tools = [tool("f", parameters)]
    try:
        assert accepts("plain", "hermes", "f", written("hermes", "f"), tools=tools) == good
        assert not accepts("plain", "hermes", "f", written("hermes", "f", '"text"'), tools=tools)
        assert not accepts("plain", "hermes", "f", written("hermes", "f", "null"), tools=tools)
    except ConfigError:
        assert not good


@pytest.mark.parametrize("form", TOOL_FORMATS)
@pytest.mark.parametrize(
    "parameters",
    [None, {}, {"type": "object"}, {"properties": {}}, {"type": "object", "properties": {}, "required": []}],
)
def test_a_function_without_arguments(form: str, parameters: dict[str, Any] | None) -> None:
    tools = [tool("f", parameters)]
    assert accepts("plain", form, "required", written(form, "f"), tools=tools)
    assert not accepts("plain", form, "required", written(form, "f", '{"a": 1}'), tools=tools)


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_arguments_have_the_properties_of_the_schema_alone(form: str) -> None:
    nested = {"type": "object", "properties": {"b": {"$ref": "#/$defs/c"}}, "required": ["b"]}
    schema = {"properties": {"a": nested}, "$defs": {"c": {"type": "object", "properties": {"d": {"type": "null"}}}}}
    for arguments, good in (
        ({"a": {"b": {"d": None}}}, True),
        ({"a": {"b": {"d": None}}, "x": 1}, False),
        ({"a": {"b": {"d": None}, "x": 1}}, False),
        ({"a": {"b": {"d": None, "x": 1}}}, False),
    ):
        call = written(form, "f", json.dumps(arguments))
        assert accepts("plain", form, "required", call, tools=[tool("f", schema)]) == good, arguments


REFUSED = {
    "no tools": ([], "auto", "at least one"),
    "unknown choice": ([tool("f")], "g", "choose auto, required or one of f"),
    "spaces": ([tool("a b")], "auto", "called 'a b'"),
    "line": ([tool("a\n")], "auto", "called"),
    "quote": ([tool('a"')], "auto", "called"),
    "long": ([tool("a" * 65)], "auto", "called"),
    "empty": ([tool("")], "auto", "called"),
    "a mode": ([tool("required")], "required", "is not auto or required"),
    "twice": ([tool("f"), tool("f")], "auto", "two functions"),
    "an array": ([tool("f", {"type": "array"})], "auto", "an object; the type is 'array'"),
    "not a number": ([tool("f", {"const": float("nan")})], "auto", "parameters of 'f': the schema is refused"),
    "deep": ([tool("f", DEEP)], "auto", "parameters of 'f': the schema is refused"),
    "many names": ([tool("f", MANY)], "auto", "parameters of 'f': the schema is refused"),
    "large": ([tool("f", {"description": "x" * 70_000})], "auto", "bytes"),
    "not compiled": ([tool("f", {"properties": {"a": {"$ref": "http://example.com/x"}}})], "auto", "is refused"),
    "half a character": ([tool("f", {"description": "\ud800"})], "auto", "is refused"),
}


@pytest.mark.parametrize("form", TOOL_FORMATS)
@pytest.mark.parametrize("what", REFUSED)
def test_tools_that_cannot_work(form: str, what: str) -> None:
    tools, choice, message = REFUSED[what]
    with pytest.raises(ConfigError, match=message) as caught:
        COMPILERS["plain"].compile(tool_grammar(form, tools, choice, True))
    assert len(str(caught.value)) < 700


def test_unknown_formats() -> None:
    with pytest.raises(ConfigError, match="llama3_json, hermes"):
        tool_grammar("xml", TOOLS, "auto", True)
    with pytest.raises(ConfigError, match="llama3_json, hermes"):
        ToolParser("xml", NAMES)


# templates that know no tools


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_messages_for_a_template_that_knows_no_tools(form: str) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "21"},
    ]
    user, said, heard = plain_messages(form, chat, None, None)
    assert (user, heard) == (chat[0], {"role": "user", "content": "21"})
    assert parse(form, ["f"], said["content"]) == ("", [("f", '{"x": 1}')])
    assert chat[1]["tool_calls"] == [call]  # what was given is left as it was
    told = plain_messages(form, chat[:1], TOOLS, None)[0]["content"]
    assert told == f"Hi\n---\n{json.dumps(TOOLS)}\n{PLAIN_PROMPTS[form]}"
    assert f'"{KEYS[form]}"' in PLAIN_PROMPTS[form]
    assert (OPEN in PLAIN_PROMPTS[form]) == (form == "hermes")
    assert plain_messages(form, [{"role": "system", "content": "Be good."}], TOOLS, "Go.") == [
        {"role": "system", "content": f"{json.dumps(TOOLS)}\nGo."},
        {"role": "system", "content": "Be good."},
    ]


# structural tags


TAGS = {
    "structures": [
        {"begin": OPEN, "schema": {"properties": {"x": {"type": "integer"}}, "required": ["x"]}, "end": CLOSE},
        {"begin": "<function=g/>", "schema": {"type": "object", "properties": {}}, "end": "</function>"},
    ],
    "triggers": [OPEN, "<function="],
}
G = "<function=g/>{}</function>"


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("", True),
        ("a < b </tool_call> <func", True),
        (f'{OPEN}{{"x": 1}}{CLOSE}', True),
        (f'So {OPEN}{{"x": 1}}{CLOSE} and {G}{G} end', True),
        (f"{OPEN}x", False),
        (f'{OPEN}{{"x": 1, "y": 1}}{CLOSE}', False),
        (f'{OPEN}{{"x": 1}}</function>', False),
        ("<function=h/>", False),
        ("<function=g/>{}", False),
    ],
)
def test_once_a_trigger_is_written_a_tag_follows(kind: str, text: str, good: bool) -> None:
    grammar = structural_tag(TAGS, added_tokens(TOKENIZERS[kind]))
    assert follows(kind, COMPILERS[kind].compile(grammar), text) == good


# grammar and parser together


def check_call(name: str, arguments: str) -> None:
    value = json.loads(arguments)
    assert isinstance(value, dict)
    if name == "weather":
        assert list(value) == ["city", "unit"]
        assert value["unit"] in ("C", "F")
    elif name == "f":
        assert isinstance(value.get("x", 0), int)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(list(TOKENIZERS)),
    st.sampled_from(TOOL_FORMATS),
    st.sampled_from(["required", "weather", "f"]),
)
def test_what_the_grammar_demands_is_read_as_calls(seed: int, kind: str, form: str, choice: str) -> None:
    text, ended = walk(kind, form, choice, seed)
    content, calls = parse(form, NAMES, text)
    if ended:
        assert content == ""
        assert calls
        for name, arguments in calls:
            check_call(name, arguments)
    assert {name for name, _ in calls} <= ({choice} if choice in NAMES else set(NAMES))


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_such_walks_come_to_an_end(form: str) -> None:
    assert sum(walk("plain", form, "weather", seed)[1] for seed in range(10)) >= 5


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(list(TOKENIZERS)),
    st.sampled_from(TOOL_FORMATS),
    st.sampled_from(["", "Yes. ", "\n"]),
)
def test_free_answers_are_text_or_good_calls(seed: int, kind: str, form: str, before: str) -> None:
    """From the call's beginning on the walk is random, so that calls come up."""
    tokenizer, generator = TOKENIZERS[kind], np.random.default_rng(seed)
    start = before + (OPEN if form == "hermes" else "{")
    ids = tokenizer.encode(start, special=False)
    matcher = COMPILERS[kind].compile(tool_grammar(form, TOOLS, "auto", True, added_tokens(tokenizer)))
    for token in ids:
        matcher.consume(token)
    while len(ids) < 100 and not matcher.allowed()[EOS]:
        ids.append(int(generator.choice(np.flatnonzero(matcher.allowed()))))
        matcher.consume(ids[-1])
    content, calls = parse(form, NAMES, tokenizer.decode(ids))
    if matcher.allowed()[EOS]:
        called = form == "hermes" or before != "Yes. "
        assert bool(calls) == called
        assert content == ("Yes. " if before == "Yes. " else "") if called else tokenizer.decode(ids)
        for name, arguments in calls:
            check_call(name, arguments)


# the parser


def joined(deltas: list[Delta]) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls, checking what holds for every list of deltas."""
    content = ""
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        if delta.call is None:
            assert delta.name is None
            assert delta.arguments == ""
            assert delta.content
            content += delta.content
            continue
        assert delta.content == ""
        assert (delta.name is not None) == (delta.call == len(calls))
        if delta.name is not None:
            calls.append((delta.name, ""))
        assert delta.call == len(calls) - 1
        calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
    return content, calls


def streamed(form: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolParser(form, NAMES)
    found = joined([delta for piece in pieces for delta in parser.push(piece)] + parser.finish())
    assert parser.calls == len(found[1])
    return found


FRAGMENTS = [
    *(OPEN, CLOSE, "<", "<tool", "_call>", "{", "}", "[", "]", '"', "\\", ":", ",", " ", "\n", "; ", "0", "é", "text"),
    *('"name"', '"weather"', '"f"', '"g"', '"arguments"', '"parameters"', '"id"', '{"a": "}\\"{"}', "{}", "-1e5"),
    *('{"name": "f", ', '"parameters": {"x": 1}}', "null"),
    *(written(form, name, "{}") for form in TOOL_FORMATS for name in ("f", "g")),
]
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=14).map("".join)


@settings(max_examples=500, deadline=None)
@given(TEXTS, st.sampled_from(TOOL_FORMATS), st.data())
def test_where_the_text_is_split_does_not_matter(text: str, form: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    whole = parse(form, NAMES, text)
    assert streamed(form, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == whole
    assert streamed(form, list(text)) == whole
    content, calls = whole
    assert all(name in NAMES and arguments.startswith("{") for name, arguments in calls)
    if not calls:
        assert content == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def a_call(draw: st.DrawFn) -> tuple[str, str, str]:
    """A function, its arguments, and an object that says so in one of the ways in which models may write it."""
    name = draw(st.sampled_from(NAMES))
    indent = draw(st.sampled_from([None, 2]))
    arguments = json.dumps(
        draw(st.dictionaries(st.text(max_size=4), JSON, max_size=3)),
        indent=indent,
        ensure_ascii=draw(st.booleans()),
    )
    members = [('"name"', json.dumps(name)), (draw(st.sampled_from(['"arguments"', '"parameters"'])), arguments)]
    if draw(st.booleans()):
        members.append(('"id"', json.dumps(draw(JSON))))
    members = draw(st.permutations(members))
    space = draw(st.sampled_from(["", " ", "\n  "]))
    inside = f",{space}".join(f"{key}{space}:{space}{value}" for key, value in members)
    return name, arguments, f"{{{space}{inside}{space}}}"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(a_call(), min_size=1, max_size=3),
    st.sampled_from(TOOL_FORMATS),
    st.sampled_from(["", "\n", "; "]),
    st.sampled_from(["", "\n\n", "Let me see <b>. "]),
)
def test_calls_are_read_as_they_were_written(
    calls: list[tuple[str, str, str]], form: str, between: str, before: str
) -> None:
    space = "" if between == "; " else between
    if form == "hermes":
        text = before + space.join(f"{OPEN}{space}{written}{space}{CLOSE}" for _, _, written in calls) + space
        content = before if before.strip() else ""
    else:
        text = (before if not before.strip() else "") + between.join(written for _, _, written in calls)
        content = ""
    expected = content, [(name, arguments) for name, arguments, _ in calls]
    assert parse(form, NAMES, text) == expected
    assert streamed(form, list(text)) == expected


NO_CALLS = {
    "llama3_json": [
        "",
        " \n",
        "{",
        "{}",
        '{"x": 1}',
        'Yes {"name": "f", "parameters": {}}',
        '{"name": "g", "parameters": {}}',
        '{"name": 5, "parameters": {}}',
        '{"name": "f"}',
        '{"name": "f", "parameters": "{}"}',
        '{"name": "f", "parameters": null}',
        '{"name" "f", "parameters": {}}',
        '{"name": "f", "param',
        '{"name": "f", "parameters": ',
        '{"parameters": {}}',
        '{"parameters": {"a": 1}',
        '{"parameters": {"a": oops}, "name": "f"}',
        '{"parameters": {"a": 1], "name": "f"}',
        '{name: "f", "parameters": {}}',
        '{"na\\qme": "f", "parameters": {}}',
        '  {"x": 1}; {"name": "f", "parameters": {}}',
    ],
    "hermes": [
        "a < b <tool_cal <tool_call",
        f"{OPEN}\nno JSON\n{CLOSE}",
        f"{OPEN}{CLOSE}",
        f'{OPEN}\n{{"name": "g", "arguments": {{}}}}\n{CLOSE} and on',
        f'{OPEN}\n{{"name": "f", "argu',
        '{"name": "f", "arguments": {}}',
        CLOSE,
    ],
}


@pytest.mark.parametrize(("form", "text"), [(form, text) for form, texts in NO_CALLS.items() for text in texts])
def test_what_is_no_call_is_content_as_it_was_written(form: str, text: str) -> None:
    assert parse(form, NAMES, text) == (text, [])


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        ("llama3_json", '{"name": "f", "parameters": {"x": ', "", [("f", '{"x": ')]),
        ("llama3_json", '{"name": "f", "parameters": {"x": "a', "", [("f", '{"x": "a')]),
        ("llama3_json", '{"name": "f", "parameters": {}', "", [("f", "{}")]),
        ("llama3_json", '{"name": "f", "parameters": {}};\n', "", [("f", "{}")]),
        ("llama3_json", '{"name": "f", "parameters": {}} Done.', " Done.", [("f", "{}")]),
        ("llama3_json", '{"name": "f", "parameters": {}}; {"name": "g"}', '; {"name": "g"}', [("f", "{}")]),
        ("llama3_json", '{"name": "f", "parameters": {}, "name": "g", "x": [}', "", [("f", "{}")]),
        ("llama3_json", '{"name": "\\u0066", "parameters": {}}', "", [("f", "{}")]),
        ("llama3_json", '{"parameters": {"x": 1}, "name": "f"', "", [("f", '{"x": 1}')]),
        ("hermes", f'{OPEN}{{"name": "f", "arguments": {{"x": 1{CLOSE}', "", [("f", '{"x": 1')]),
        ("hermes", f'{OPEN}{{"name": "f", "arguments": {{"x": 1}}\n{CLOSE}', "", [("f", '{"x": 1}')]),
        ("hermes", f'{OPEN}{{"name": "f", "arguments": {{}}}}\n</tool', "", [("f", "{}")]),
        ("hermes", written("hermes", "f") + " \n Done. </tool", " \n Done. </tool", [("f", "{}")]),
        ("hermes", written("hermes", "f") + " <tool_call", " <tool_call", [("f", "{}")]),
        ("hermes", OPEN + "no " + written("hermes", "f"), OPEN + "no ", [("f", "{}")]),
        (
            "hermes",
            written("hermes", "f").removesuffix(CLOSE)
            + written("hermes", "weather", '{"</tool_call>": "<tool_call>"}'),
            "",
            [("f", "{}"), ("weather", '{"</tool_call>": "<tool_call>"}')],
        ),
        ("hermes", f"A {written('hermes', 'f')} B {written('hermes', 'f')}", "A  B ", [("f", "{}"), ("f", "{}")]),
    ],
)
def test_calls_that_are_cut_or_in_odd_company(form: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parse(form, NAMES, text) == (content, calls)
    assert streamed(form, list(text)) == (content, calls)


def test_as_little_as_possible_is_held_back() -> None:
    hermes = ToolParser("hermes", NAMES)
    assert hermes.push("Hi ") == [Delta(content="Hi ")]
    assert hermes.push("a <tool") == [Delta(content="a ")]
    assert hermes.push("s> <") == [Delta(content="<tools> ")]
    assert hermes.push('tool_call>\n{"name": "f", "arguments": ') == []
    assert hermes.push('{"x') == [Delta(call=0, name="f"), Delta(call=0, arguments='{"x')]
    assert hermes.push('": 1}}\n</tool_call>') == [Delta(call=0, arguments='": 1}')]
    llama = ToolParser("llama3_json", NAMES)
    assert llama.push(" \n") == []
    assert llama.push("No") == [Delta(content=" \nNo")]
    assert llama.push(' {"name') == [Delta(content=' {"name')]
    llama = ToolParser("llama3_json", NAMES)
    assert llama.push('{"parameters": {"x": 1}') == []
    assert llama.push(', "name": "f"') == [Delta(call=0, name="f"), Delta(call=0, arguments='{"x": 1}')]
    llama = ToolParser("llama3_json", NAMES)
    assert llama.push('{"name": "unknown"') == [Delta(content='{"name": "unknown"')]


LONG = {
    "text": ("hermes", "word " * 40_000),
    "beginnings of markers": ("hermes", "<tool_cal" * 20_000),
    "white space": ("hermes", " " * 200_000),
    "markers": ("hermes", (OPEN + '{"') * 15_000),
    "arguments first": ("llama3_json", '{"parameters": {"a": [' + "1," * 100_000 + '1]}, "name": "f"}'),
    "one argument": ("llama3_json", '{"name": "f", "parameters": {"a": "' + "x\\n" * 60_000 + '"}}'),
    "nesting": ("llama3_json", '{"name": "f", "parameters": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}"),
    "nesting, arguments first": ("llama3_json", '{"parameters": {"a": ' + "[" * 200_000),
    "calls": ("llama3_json", '{"name": "f", "parameters": {}};' * 6_000),
}


@pytest.mark.parametrize("what", LONG)
def test_long_answers_cost_no_more_than_their_length(what: str) -> None:
    form, text = LONG[what]
    began = time.monotonic()
    parser = ToolParser(form, NAMES)
    deltas = [delta for character in text for delta in parser.push(character)] + parser.finish()
    length = sum(len(delta.content) + len(delta.arguments) for delta in deltas)
    content, calls = parse(form, NAMES, text)
    assert length == len(content) + sum(len(arguments) for _, arguments in calls)
    assert time.monotonic() - began < 30  # seconds; two orders more than it takes, which quadratic cost exceeds


# messages


def test_messages_for_templates() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert template_messages(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "5", "tool_call_id": "call_1"},
            {"role": "assistant", "content": "c", "tool_calls": []},
            {"role": "assistant"},
        ]
    ) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**call, "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "5", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": ""},
    ]


def calling(function: object) -> dict[str, object]:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "ipython", "content": "a"}, "one of system, developer, user, assistant, tool"),
        ({"content": "a"}, "role None"),
        ({"role": "user"}, "must be text"),
        ({"role": "user", "content": 5}, "must be text"),
        ({"role": "user", "content": ["a"]}, "text parts only"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}, "'image_url'"),
        ({"role": "user", "content": [{"type": "input_audio", "text": "a"}]}, "'input_audio'"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "text parts only"),
        (calling({"name": "f", "arguments": "[1]"}), "must be a JSON object"),
        (calling({"name": "f", "arguments": "{"}), "no JSON"),
        (calling({"name": "f", "arguments": '{"a":' * 100_000}), "no JSON"),
        (calling({"name": "f", "arguments": 1}), "must be a JSON object"),
        (calling({"arguments": "{}"}), "a function with a name"),
        (calling("f"), "a function with a name"),
        ({"role": "assistant", "tool_calls": ["f"]}, "a function with a name"),
    ],
)
def test_messages_that_are_refused(message: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
        template_messages([message])
    assert len(str(caught.value)) < 300


def render(template: str, messages: list[dict[str, Any]]) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, indent=indent)
    tools = [tool("weather", WEATHER)]
    return environment.from_string(template).render(messages=template_messages(messages), tools=tools, bos_token="")


CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "How warm is it?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
        ],
    },
    {"role": "tool", "content": "5 C", "tool_call_id": "1"},
    {"role": "assistant", "content": None},
]


def test_llamas_template_takes_them() -> None:
    if not LLAMA_TEMPLATE.is_file():
        pytest.skip(f"{LLAMA_TEMPLATE} is not there")
    text = render(LLAMA_TEMPLATE.read_text(encoding="utf-8"), CHAT)
    assert '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>' in text
    assert "None" not in text


def test_a_template_that_adds_content_to_text_takes_them() -> None:
    text = render(QWEN_TEMPLATE, CHAT)
    assert '<|im_start|>assistant\n<tool_call>weather{"city": "Oslo"}</tool_call><|im_end|>' in text
    assert text.endswith("<|im_start|>assistant\n<|im_end|>")
