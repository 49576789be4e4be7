"""Grammars: what comes out matches, and what is wrong or too large is refused at once."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squawq.demo import demo_model
from squawq.engine.grammar import MAX_CACHED, GrammarCompiler, GrammarError
from squawq.engine.request import Grammar
from squawq.errors import ConfigError
from squawq.tokenizer import Tokenizer

TOKENIZER = Tokenizer(demo_model())
EOS = 4
VOCAB = 4100  # a few rows more than the tokenizer has, as models padded for speed have
COMPILER = GrammarCompiler(TOKENIZER, VOCAB, [EOS])
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["cat", "dog"]},
        "likes": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "likes"],
    "additionalProperties": False,
}


def walk(grammar: Grammar, seed: int, most: int = 400) -> str | None:
    """Text of random allowed tokens, the end token as soon as it may; None if it did not come."""
    generator, matcher = np.random.default_rng(seed), COMPILER.compile(grammar)
    ids: list[int] = []
    for _ in range(most):
        allowed = matcher.allowed()
        assert allowed.shape == (VOCAB,)
        assert not allowed[4096:].any()
        if allowed[EOS]:
            return TOKENIZER.decode(ids)
        ids.append(int(generator.choice(np.flatnonzero(allowed))))
        matcher.consume(ids[-1])
    return None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_json_of_a_schema(seed: int) -> None:
    text = walk(Grammar("json_schema", json.dumps(SCHEMA)), seed)
    if text is not None:
        value = json.loads(text)
        assert list(value) == SCHEMA["required"]
        assert isinstance(value["name"], str)
        assert len(value["name"]) <= 12
        assert 0 <= value["age"] <= 130
        assert value["kind"] in ("cat", "dog")
        assert all(isinstance(item, bool) for item in value["likes"])


@pytest.mark.parametrize(
    ("kind", "text", "outcomes"),
    [
        ("regex", "(one|two)!", {"one!", "two!"}),
        ("lark", 'start: "x" ("y" | "z")', {"xy", "xz"}),
        ("json_schema", '{"enum": ["é", 5]}', {'"é"', "5"}),
    ],
)
def test_small_grammars_give_all_they_allow(kind: str, text: str, outcomes: set[str]) -> None:
    assert {walk(Grammar(kind, text), seed) for seed in range(20)} == outcomes


@pytest.mark.parametrize("indent", [None, 2, 4])
def test_json_may_be_indented_but_not_padded_for_ever(indent: int | None) -> None:
    matcher = COMPILER.compile(Grammar("json_schema", '{"type": "array"}'))
    text = json.dumps([1, ["a", {"b": [2]}]], indent=indent)
    for token in TOKENIZER.encode(text, special=False):
        matcher.consume(token)
    assert matcher.allowed()[EOS]
    two = COMPILER.compile(Grammar("json_schema", '{"type": "array"}'))
    two.consume(TOKENIZER.encode("[", special=False)[0])
    line = TOKENIZER.encode("\n", special=False)[0]
    two.consume(line)
    assert not two.allowed()[line]


def test_a_complete_text_may_only_end() -> None:
    matcher = COMPILER.compile(Grammar("regex", "ab"))
    for token in TOKENIZER.encode("ab", special=False):
        assert not matcher.complete
        matcher.consume(token)
    assert matcher.complete
    assert np.flatnonzero(matcher.allowed()).tolist() == [EOS]


def test_matchers_go_on_separately() -> None:
    grammar = Grammar("regex", "abc")
    first = COMPILER.compile(grammar)
    first.consume(TOKENIZER.encode("a", special=False)[0])
    assert not np.array_equal(first.allowed(), COMPILER.compile(grammar).allowed())


def test_a_forbidden_token_is_an_error() -> None:
    with pytest.raises(GrammarError):
        COMPILER.compile(Grammar("regex", "a")).consume(TOKENIZER.encode("z", special=False)[0])


REFUSED = {
    "unclosed": ("regex", "["),
    "look-around": ("regex", "(?=a)b"),
    "too large": ("regex", "a{1000000}"),
    "nested too large": ("regex", "((a{1000}){1000}){1000}"),
    "slow": ("regex", ".*" * 2000),
    "no such type": ("json_schema", '{"type": "strng"}'),
    "no JSON": ("json_schema", "{"),
    "deep": ("json_schema", '{"items":' * 2000 + "{}" + "}" * 2000),
    "nothing matches": ("json_schema", "false"),
    "endless": ("json_schema", '{"$ref": "#"}'),
    "from elsewhere": ("json_schema", '{"$ref": "http://example.com/x"}'),
    "unknown rule": ("lark", "start: x"),
    "no start": ("lark", 'x: "a"'),
    "deep lark": ("lark", "start: " + '("a"|' * 3000 + '"b"' + ")" * 3000),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_little_time_with_a_short_message(case: str) -> None:
    kind, text = REFUSED[case]
    began = time.monotonic()
    with pytest.raises(ConfigError, match=f"the {kind} grammar is refused") as caught:
        COMPILER.compile(Grammar(kind, text))
    assert len(str(caught.value)) < 600
    assert time.monotonic() - began < 20  # seconds; what is not bounded takes minutes


def test_the_latest_grammars_are_kept() -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCAB, [EOS])
    for number in range(MAX_CACHED + 3):
        compiler.compile(Grammar("regex", f"a{number}"))
    assert len(compiler._compiled) == MAX_CACHED


def test_no_end_token() -> None:
    with pytest.raises(ConfigError, match="end token"):
        GrammarCompiler(TOKENIZER, VOCAB, [])
