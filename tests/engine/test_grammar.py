"""Grammars: what comes out matches, and what is wrong or too large is refused at once."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import hostile
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squawq.demo import demo_model
from squawq.engine import grammar as module
from squawq.engine.grammar import MAX_CACHED, MAX_CACHED_TEXT, MAX_COMPILING, GrammarCompiler, GrammarError, Matcher
from squawq.engine.request import Grammar
from squawq.errors import ConfigError, EngineClosed, QueueFull
from squawq.text.tokenizer import Tokenizer

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


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, special=False)


def walk(grammar: Grammar, seed: int, most: int = 400) -> str | None:
    """Text of random allowed tokens, the end token as soon as it may; None if it did not come."""
    generator, matcher = np.random.default_rng(seed), COMPILER.compile(grammar)
    chosen: list[int] = []
    for _ in range(most):
        allowed = matcher.allowed()
        assert allowed.shape == (VOCAB,)
        assert not allowed[4096:].any()
        if allowed[EOS]:
            return TOKENIZER.decode(chosen)
        chosen.append(int(generator.choice(np.flatnonzero(allowed))))
        matcher.consume(chosen[-1])
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
    for token in ids(text):
        matcher.consume(token)
    assert matcher.allowed()[EOS]
    two = COMPILER.compile(Grammar("json_schema", '{"type": "array"}'))
    two.consume(ids("[")[0])
    line = ids("\n")[0]
    two.consume(line)
    assert not two.allowed()[line]


def test_a_complete_text_may_only_end() -> None:
    matcher = COMPILER.compile(Grammar("regex", "ab"))
    for token in ids("ab"):
        assert not matcher.complete
        matcher.consume(token)
    assert matcher.complete
    assert np.flatnonzero(matcher.allowed()).tolist() == [EOS]


def test_matchers_go_on_separately() -> None:
    grammar = Grammar("regex", "abc")
    first = COMPILER.compile(grammar)
    first.consume(ids("a")[0])
    second = first.copy()
    assert np.array_equal(second.allowed(), first.allowed())
    assert not np.array_equal(first.allowed(), COMPILER.compile(grammar).allowed())
    second.consume(ids("b")[0])
    assert not np.array_equal(second.allowed(), first.allowed())


def test_a_forbidden_token_is_an_error() -> None:
    matcher = COMPILER.compile(Grammar("regex", "a"))
    matcher.consume(ids("z")[0])
    for _ in range(2):
        with pytest.raises(GrammarError):
            matcher.allowed()


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


def steps(matcher: Matcher, most: int = 40, seed: int = 0) -> int:
    """How far random allowed tokens lead before the end. Raises GrammarError."""
    generator = np.random.default_rng(seed)
    for step in range(most):
        choices = np.flatnonzero(matcher.allowed())
        if matcher.complete:
            return step
        matcher.consume(int(generator.choice(choices[choices != EOS])))
    return most


def test_hostile_grammars_are_refused_or_used_in_little_time() -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCAB, [EOS], timeout_s=0.5)
    texts = {"regex": hostile.regexes(66, 5), "json_schema": hostile.schemas(68, 5), "lark": hostile.larks(66, 5)}
    used, errors = 0, []
    for grammar in [Grammar(kind, text) for kind in texts for text in texts[kind]]:
        began = time.monotonic()
        try:
            steps(compiler.compile(grammar), 10)
            used += 1
        except (ConfigError, GrammarError) as error:
            errors.append(error)
        assert time.monotonic() - began < 20, (grammar.kind, grammar.text[:100])
    assert used > 50
    assert {type(error) for error in errors} == {ConfigError, GrammarError}
    assert max(len(str(error)) for error in errors) < 600
    assert steps(compiler.compile(Grammar("regex", "ab"))) <= 2
    compiler.close()


DEEP = "\n".join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(4500)), 'r4500: "a"'])
LOOP = "y: /a*/ y"


def test_what_loops_later_ends_its_own_sequence_alone() -> None:
    other = COMPILER.compile(Grammar("regex", "a{100}"))
    matcher = COMPILER.compile(Grammar("lark", f"start: /[xz]{{20}}/ y\n{LOOP}"))
    with pytest.raises(GrammarError, match="too much time"):
        steps(matcher)
    assert steps(other, 5) == 5


def test_what_went_wrong_with_a_tenants_grammar_is_not_anothers() -> None:
    grammar = Grammar("lark", f"start: /[xz]{{20}}/ y\n{LOOP}")
    with pytest.raises(GrammarError, match="too much time"):
        steps(COMPILER.compile(grammar, "a"))
    with pytest.raises(ConfigError, match="not long ago"):
        COMPILER.compile(grammar, "a")
    assert steps(COMPILER.compile(grammar, "b"), 5) == 5


def test_a_tenant_compiles_its_own_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long it takes does not tell which ones others use."""
    compiler = GrammarCompiler(TOKENIZER, VOCAB, [EOS])
    new, made = compiler._new, []
    monkeypatch.setattr(compiler, "_new", lambda grammar: made.append(grammar) or new(grammar))  # type: ignore[func-returns-value]
    for tenant in "aabb":
        compiler.compile(Grammar("regex", "ab"), tenant)
    assert len(made) == 2


def test_a_tenant_cannot_take_all_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LIVE", 6)
    compiler = GrammarCompiler(TOKENIZER, VOCAB, [EOS])
    used: list[Matcher] = []

    def fill(tenant: str) -> int:
        """How many grammars a tenant gets."""
        for number in range(10):
            try:
                used.append(compiler.compile(Grammar("regex", f"a{len(used)}b"), tenant))
            except QueueFull:
                return number
        return 10

    assert [fill(tenant) for tenant in "abca"] == [6, 3, 2, 0]


@pytest.mark.parametrize("text", [DEEP, f"start: y\n{LOOP}"], ids=["stack", "loop"])
def test_what_crashes_or_loops_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="the lark grammar is refused: it took too much time or memory, or crashed"):
        COMPILER.compile(Grammar("lark", text))


def test_what_one_sequence_uses_up_is_its_own() -> None:
    grammar = Grammar("regex", r"((\w){1,2576}){1,2719}")  # reaches a limit of the library after some tokens
    for _ in range(2):
        with pytest.raises(GrammarError, match="too many"):
            steps(COMPILER.compile(grammar), 200)
        assert steps(COMPILER.compile(grammar), 2) == 2


def test_the_latest_grammars_are_kept() -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCAB, [EOS])
    for number in range(MAX_CACHED + 3):
        compiler.compile(Grammar("regex", f"a{number}"))
    assert len(compiler._cached) == len(compiler._live) == MAX_CACHED
    for number in range(12):
        compiler.compile(Grammar("regex", "|".join([f"b{number}"] * 15_000)))
    assert sum(len(grammar.text) for _, grammar in compiler._cached) <= MAX_CACHED_TEXT
    assert 0 < len(compiler._live) < 12


def test_a_grammar_in_use_is_kept_beyond_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CACHED", 2)
    monkeypatch.setattr(module, "MAX_LIVE", 5)
    compiler = GrammarCompiler(TOKENIZER, VOCAB, [EOS])
    compiler.compile(Grammar("regex", "unused"))
    used = [compiler.compile(Grammar("regex", f"a{number}b")) for number in range(5)]
    with pytest.raises(QueueFull, match="5 different grammars"):
        compiler.compile(Grammar("regex", "c"))
    again = compiler.compile(Grammar("regex", "a0b"))  # is there still
    assert [steps(matcher, 1) for matcher in (*used, again)] == [1] * 6
    del used[:3], again
    compiler.compile(Grammar("regex", "c"))


def test_slow_grammars_do_not_hold_up_a_known_one() -> None:
    compiler, known = GrammarCompiler(TOKENIZER, VOCAB, [EOS], timeout_s=1), Grammar("regex", "abc")
    compiler.compile(known)

    def compile_slowly() -> None:
        with pytest.raises((ConfigError, QueueFull), match=r"too much time|being compiled"):
            compiler.compile(Grammar("lark", f"start: y\n{LOOP}"))

    slow = [threading.Thread(target=compile_slowly) for _ in range(2 * MAX_COMPILING)]
    for thread in slow:
        thread.start()
    for _ in range(20):
        compiler.compile(known)
    assert all(thread.is_alive() for thread in slow)  # they need a second
    for thread in slow:
        thread.join()
    compiler.compile(Grammar("regex", "new"))


def test_the_vocabularys_process_is_started_again() -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCAB, [EOS])
    compiler.compile(Grammar("regex", "a"))
    assert compiler._vocabulary is not None
    assert compiler._vocabulary._process is not None
    os.kill(compiler._vocabulary._process.pid, signal.SIGKILL)
    compiler._vocabulary._process.wait()
    assert steps(compiler.compile(Grammar("regex", "a"))) == 1
    assert steps(compiler.compile(Grammar("regex", "b"))) == 1


def test_closing() -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCAB, [EOS])
    compiler.compile(Grammar("regex", "a"))
    compiler.close()
    compiler.close()
    assert compiler._vocabulary is not None
    assert not compiler._vocabulary.alive
    for text in ("a", "b"):
        with pytest.raises(EngineClosed):
            compiler.compile(Grammar("regex", text))


def test_settings_of_the_library_are_not_the_schemas_to_change() -> None:
    schema = {"type": "array", "minItems": 1, "x-guidance": {"whitespace_pattern": "x*"}}
    matcher = COMPILER.compile(Grammar("json_schema", json.dumps(schema)))
    matcher.consume(ids("[")[0])
    assert not matcher.allowed()[ids("x")[0]]


def test_no_end_token() -> None:
    with pytest.raises(ConfigError, match="end token"):
        GrammarCompiler(TOKENIZER, VOCAB, [])


def test_a_grammar_whose_process_was_killed_is_compiled_again() -> None:
    grammar = Grammar("regex", "killed-[0-9]+")
    matcher = COMPILER.compile(grammar)
    matcher._start.child.close()  # as a process that is gone
    with pytest.raises(GrammarError, match="process"):
        matcher.consume(ids("k")[0])
    again = COMPILER.compile(grammar)
    again.consume(ids("k")[0])
    assert again.allowed().any()


def test_a_grammar_that_took_too_long_is_refused_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = Grammar("lark", "start: /[xz]{6}/ y\ny: /a*/ y")  # it loops after six tokens
    matcher = COMPILER.compile(grammar)
    for _ in range(6):
        matcher.consume(ids("x")[0])
    with pytest.raises(GrammarError, match="too complex"):
        matcher.allowed()
    with pytest.raises(ConfigError, match="a token took too long"):
        COMPILER.compile(grammar)
    later = time.monotonic() + module.BAD_S
    monkeypatch.setattr("squawq.engine.grammar.time.monotonic", lambda: later)
    assert COMPILER.compile(grammar).allowed().any()
