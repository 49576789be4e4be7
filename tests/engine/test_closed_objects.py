"""Closed objects: what JSON schemas let through after `close_objects`, by the grammar that an answer is held to."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squawq.demo import demo_model
from squawq.engine.grammar import GrammarCompiler
from squawq.engine.request import Grammar
from squawq.engine.schema import close_objects
from squawq.errors import ConfigError
from squawq.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(demo_model())
EOS = 4
COMPILER = GrammarCompiler(TOKENIZER, 4096, [EOS])


def accepts(schema: Any, value: Any) -> bool:
    """Whether an answer held to the schema may be this value."""
    matcher = COMPILER.compile(Grammar("json_schema", json.dumps(schema)))
    for token in TOKENIZER.encode(json.dumps(value), special=False):
        if not matcher.allowed()[token]:
            return False
        matcher.consume(token)
    return bool(matcher.allowed()[EOS])


A: dict[str, Any] = {"properties": {"a": {"type": "boolean"}}, "required": ["a"]}
B: dict[str, Any] = {"properties": {"b": {"type": "integer"}}, "required": ["b"]}
OBJECT = {"type": "object"}
NESTED = {"properties": {"x": A, "y": {"type": "array", "items": A}, "z": {"prefixItems": [A], "items": False}}}
LIST = {"properties": {"head": A, "tail": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}
CASES: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "no type": (A, [{"a": True}], [{"a": True, "b": 1}, {}, True, "a"]),
    "no properties": ({**OBJECT, "properties": {}}, [{}], [{"a": 1}]),
    "a map": (OBJECT, [{}, {"a": 1}], [1]),
    "opened": ({**A, "additionalProperties": True}, [{"a": True, "b": 1}], [{"a": 1}]),
    "opened for some": (
        {**A, "additionalProperties": {"type": "null"}},
        [{"a": True, "b": None}],
        [{"a": True, "b": 1}],
    ),
    "a required name": (
        {**A, "required": ["a", "b"]},
        [{"a": True, "b": 1}],
        [{"a": True}, {"a": True, "b": 1, "c": 1}],
    ),
    "patterns": (
        {**A, "patternProperties": {"^x": {"type": "null"}}},
        [{"a": True, "xy": None}],
        [{"a": True, "xy": 1}, {"a": True, "y": None}],
    ),
    "nested": (
        NESTED,
        [{"x": {"a": True}, "y": [{"a": False}], "z": [{"a": True}]}],
        [
            {"x": {"a": True, "b": 1}},
            {"y": [{"a": True, "b": 1}]},
            {"z": [{"a": True, "b": 1}]},
        ],
    ),
    "a definition": (
        {"properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": {"a": A}},
        [{"x": {"a": True}}],
        [{"x": {"a": True, "b": 1}}],
    ),
    "an old definition": ({"$ref": "#/definitions/a", "definitions": {"a": A}}, [{"a": True}], [{"a": True, "b": 1}]),
    "recursive": (
        LIST,
        [{"head": {"a": True}, "tail": {"head": {"a": False}, "tail": None}}],
        [{"tail": {"more": 1}}, {"tail": {"head": {"a": True, "b": 1}}}],
    ),
    "all of": (
        {**OBJECT, "allOf": [A, B]},
        [{"a": True, "b": 1}],
        [{"a": True}, {"a": True, "b": True}, {"a": True, "b": 1, "c": 1}],
    ),
    "any of": ({"anyOf": [A, B]}, [{"a": True}, {"b": 1}], [{"a": True, "b": 1}, {"c": 1}, 1]),
    "any of, beside": (
        {**OBJECT, **A, "anyOf": [B, {"properties": {"c": {"type": "null"}}}]},
        [{"a": True, "b": 1}, {"a": True, "c": None}, {"a": True}],
        [{"a": True, "b": 1, "c": None}, {"a": True, "d": 1}],
    ),
    "a reference, beside": (
        {"$ref": "#/$defs/a", **B, "$defs": {"a": A}},
        [{"a": True, "b": 1}],
        [{"a": True}, {"a": True, "b": 1, "c": 1}],
    ),
    "inherited": (
        {"properties": {"x": {"allOf": [{"$ref": "#/$defs/a"}, B]}, "y": {"$ref": "#/$defs/a"}}, "$defs": {"a": A}},
        [{"x": {"a": True, "b": 1}, "y": {"a": True}}],
        [{"x": {"a": True, "b": 1, "c": 1}}, {"y": {"a": True, "b": 1}}],
    ),
    "all of, opened": ({**OBJECT, "allOf": [A], "additionalProperties": True}, [{"a": True, "b": 1}], [{"b": 1}]),
    "a reference, opened": (
        {"$ref": "#/$defs/a", "additionalProperties": True, "$defs": {"a": A}},
        [{"a": True, "b": 1}],
        [{"b": 1}],
    ),
    "unevaluated": (
        {"allOf": [A], "unevaluatedProperties": False, **B},
        [{"a": True, "b": 1}],
        [{"a": True, "b": 1, "c": 1}],
    ),
    "constants": ({"properties": {"a": {}}, "enum": [{"a": 1, "b": 2}]}, [{"a": 1, "b": 2}], [{"a": 1}]),
    "text or object": ({"type": ["string", "object"], **A}, ["text", {"a": True}], [{"a": True, "b": 1}]),
}


@pytest.mark.parametrize("what", CASES)
def test_what_a_closed_schema_lets_through(what: str) -> None:
    schema, good, bad = CASES[what]
    assert [value for value in good if not accepts(schema, value)] == []
    assert [value for value in bad if accepts(schema, value)] == []


LEAVES = st.sampled_from([{"type": "null"}, {"type": "integer"}, {"const": 1}, True, {}])
OBJECTS = st.fixed_dictionaries(
    {"type": st.just("object"), "properties": st.dictionaries(st.sampled_from("abc"), LEAVES, max_size=3)},
    optional={"required": st.lists(st.sampled_from("abc"), max_size=2, unique=True)},
)
SCHEMAS = st.recursive(
    OBJECTS,
    lambda inner: (
        st.builds(
            lambda key, parts: {key: parts},
            st.sampled_from(["allOf", "anyOf"]),
            st.lists(inner, min_size=1, max_size=2),
        )
        | st.builds(lambda base, part: {**base, "anyOf": [part]}, OBJECTS, inner)
        | st.builds(lambda part: {"type": "object", "properties": {"a": part}}, inner)
    ),
    max_leaves=4,
)


def satisfiable(schema: Any) -> bool:
    try:
        COMPILER.compile(Grammar("json_schema", json.dumps(schema)))
    except ConfigError:
        return False
    return True


def opened(schema: Any) -> Any:
    """The schema with a word on additionalProperties everywhere."""
    if isinstance(schema, list):
        return [opened(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: opened(value) for key, value in schema.items()}
    return {**made, "additionalProperties": True} if isinstance(schema.get("properties"), dict) else made


@settings(max_examples=30, deadline=None)
@given(SCHEMAS)
def test_closing_leaves_values_where_there_were_some(schema: Any) -> None:
    assert close_objects(opened(schema)) == opened(schema)  # what says a word stays as it is
    assert satisfiable(schema) == satisfiable(opened(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"properties": {f"a{i}": True}} for i in range(2000)]},
        {"$ref": "#/$defs/0", "$defs": {str(i): {"allOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(40)}},
    ],
)
def test_schemas_that_cost_too_much(schema: Any) -> None:
    with pytest.raises(ValueError, match="combines too many properties"):
        close_objects(schema)


def test_what_is_no_schema_is_left_to_the_compiler() -> None:
    values: list[Any] = [True, None, [], "x", {"type": "object", "properties": 1, "allOf": {}, "required": ["a"]}]
    values += [{"$ref": 5, "items": 3, "$defs": []}, {"type": 5, "properties": []}]
    for value in values:
        assert close_objects(value) == value
