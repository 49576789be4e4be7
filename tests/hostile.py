"""Grammars that try to cost much time or memory: regexes, JSON schemas and Lark grammars, from a seed. Many are wrong.

Whatever they are, each must be refused, or be compiled and used, in little time. Knows no compiler.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

MAX_BYTES = 64 * 1024
Schema = dict[str, Any] | bool


def regexes(n: int, seed: int) -> list[str]:
    """n regexes."""
    return _draw(REGEXES, n, Random(f"regex {seed}"))


def schemas(n: int, seed: int) -> list[str]:
    """n JSON schemas as text."""
    return _draw(SCHEMAS, n, Random(f"schema {seed}"))


def larks(n: int, seed: int) -> list[str]:
    """n Lark grammars."""
    return _draw(LARKS, n, Random(f"lark {seed}"))


def _draw(kinds: Sequence[Callable[[Random], str]], n: int, r: Random) -> list[str]:
    """Each kind in its turn, cut to the size that a grammar may have."""
    texts = [kinds[i % len(kinds)](r) for i in range(n)]
    return [text.encode("utf-8", "surrogatepass")[:MAX_BYTES].decode("utf-8", "ignore") or "x" for text in texts]


def _size(r: Random, most: int, least: int = 1) -> int:
    """Small as often as large."""
    return int(least * (most / least) ** r.random())


def _word(r: Random, letters: str = "abcdefgh", most: int = 12) -> str:
    return "".join(r.choices(letters, k=r.randint(1, most)))


def _words(r: Random, most: int = 6000) -> list[str]:
    start, end = _word(r), _word(r)
    kinds = [lambda: _word(r, "ab", 20), lambda: start + _word(r), lambda: _word(r) + end, lambda: str(r.random())]
    return [r.choice(kinds)() for _ in range(_size(r, most))]


# Regexes

ATOMS = [
    "a",
    ".",
    "é",
    "ab",
    "[a-z]",
    "[^a]",
    r"\w",
    r"\d",
    r"\s",
    r"\S",
    r"\p{L}",
    r"\p{Greek}",
    "(a|b)",
    "(a|a)",
    "(?i:k)",
]


def _nested_counts(r: Random) -> str:
    text = r.choice(ATOMS)
    for _ in range(r.randint(1, 7)):
        low = _size(r, 3000)
        text = f"({text}{r.choice(['', *ATOMS])}){{{r.choice([0, 1, low])},{low + _size(r, 3000)}}}"
    return text


def _big_count(r: Random) -> str:
    form = r.choice(["{%d}", "{0,%d}", "{%d,}", "{1,%d}"]) % _size(r, int(10 ** r.uniform(1, 10)))
    return r.choice(["", "x", ".*"]) + r.choice(ATOMS) + form + r.choice(["", "x", ".*x"])


def _alternation(r: Random) -> str:
    text = "(" + "|".join(_words(r)) + ")"
    return text + r.choice(["", "*", "+", "?", "{3,90}", "*" + text, ".*" + text])


def _backtracking(r: Random) -> str:
    inner = ["(a|a)*", "(a*)*", "(a+)+", "(a|aa)+", "(.*)*", "(a|b|ab)*", "(.*a){12}", "(a?){30}a{30}"]
    return r.choice(inner) * _size(r, 3000) + r.choice(["b", "", "$", "!"])


def _many_states(r: Random) -> str:
    """A deterministic automaton for these has 2^k states."""
    k = _size(r, 4000)
    far = f"(.*a.{{{k}}}|.*b.{{{k + 7}}}c)"
    return r.choice([f"(a|b)*a(a|b){{{k}}}", f".*a.{{{k}}}", far, f"{far}{far}x", f"[^x]*[ab][^y]{{{k}}}z"])


def _contains(r: Random) -> str:
    return r.choice(["", "(?i)", "(?s)"]) + "(" + "|".join(f".*{w}.*" for w in _words(r, 600)) + ")"


def _optional(r: Random) -> str:
    count = _size(r, 8000)
    return r.choice([r"\w?", "a?", ".?", "[ab]*", "(ab?)?", ".*", r"\d+"]) * count + "a" * r.randint(0, count)


def _unicode(r: Random) -> str:
    names = ["L", "Lu", "N", "P", "S", "Han", "Cyrillic", "Emoji", "Cn", "Any"]
    parts = [f"\\p{{{r.choice(names)}}}{{{r.randint(0, 3)},{_size(r, 3000, 4)}}}" for _ in range(_size(r, 60))]
    return "".join(parts) + r.choice(["", r"[\u{10000}-\u{10ffff}]*", r"\W{5,500}", "(?i)ß{1,99}", "[\\p{L}--a]"])


def _brackets(r: Random) -> str:
    depth = _size(r, 30_000)
    left, right = r.choice([("(", ")"), ("(a|", ")"), ("(", ")*"), ("(?:", "){1,2}"), ("[", "]"), ("(a", ")?")])
    return left * depth + "a" + right * (depth - r.choice([0, 0, 1]))


def _any_regex(r: Random, depth: int | None = None) -> str:
    depth = r.randint(1, 6) if depth is None else depth
    if depth == 0:
        return r.choice(ATOMS)
    joined = r.choice(["", "|"]).join(_any_regex(r, depth - 1) for _ in range(r.randint(1, 4)))
    return f"({joined})" + r.choice(["", "*", "+", "?", f"{{{r.randint(0, 40)},{_size(r, 9000, 40)}}}"])


def _wrong_regex(r: Random) -> str:
    pieces = [*"()[]{}*\\|?^$\0\n/é😀a,&~", "(?=", "(?<a>", "\\1", "\\b", "9" * 22]
    return "".join(r.choices(pieces, k=_size(r, 20_000)))


REGEXES = [
    *(_nested_counts, _big_count, _alternation, _backtracking, _many_states, _contains),
    *(_optional, _unicode, _brackets, _any_regex, _wrong_regex),
]


def _regex(r: Random, most: int = 2000) -> str:
    """One for use in something larger."""
    return r.choice(REGEXES)(r).replace("/", "").replace("\n", "")[:most]


# JSON schemas


def _deep(r: Random) -> str:
    depth = _size(r, 6000)
    sides = [('{"items":', "}"), ('{"not":', "}"), ('{"properties":{"a":', "}}"), ('{"anyOf":[', "]}"), ("[", "]")]
    more = [('{"allOf":[{"type":"object"},', "]}"), ('{"prefixItems":[{},', '],"minItems":2}')]
    left, right = r.choice([*sides, *more])
    return left * depth + r.choice(["{}", "true", '{"type":"string"}']) + right * depth


def _leaf(r: Random) -> Schema:
    big = _size(r, int(10 ** r.uniform(1, 12)))
    number = r.choice([1, 0.1, 1e-9, 7, 1e300, 123456789, 0, -3, 2**53 + 1, 1e-320])
    leaves: list[Schema] = [
        {"type": "string", "minLength": r.choice([0, big]), "maxLength": big * r.choice([1, 2])},
        {"type": "string", "pattern": _regex(r)},
        {"type": "string", "pattern": _word(r), "minLength": big, "format": "date"},
        {"type": "array", "minItems": r.choice([0, big]), "maxItems": big * 2},
        {"type": "array", "items": {"enum": _words(r, 90)}, "minItems": big % 5000, "uniqueItems": True},
        {"type": "integer", "minimum": -big, "maximum": big, "multipleOf": number},
        {"type": "number", "exclusiveMinimum": number, "maximum": big, "multipleOf": r.choice([0.01, 3, 1e-7])},
        {"type": "object", "minProperties": big % 900, "maxProperties": big},
        {"type": "string", "format": r.choice(["date-time", "uuid", "email", "ipv6", "uri", "regex", "nope"])},
        {"const": r.choice([None, big, "x" * (big % 9000), [1] * (big % 900)])},
        {"enum": []},
        {"type": "string", "minLength": 9, "maxLength": 2},
        {"type": ["string", "integer", "null", "array", "object"]},
        True,
        False,
    ]
    return r.choice(leaves)


def _properties(r: Random) -> str:
    count = _size(r, 4000)
    names = [r.choice([f"p{i}", "p" * (i % 70 + 1) + str(i), _word(r) + str(i)]) for i in range(count)]
    value: Schema = r.choice([{"type": "string"}, {"$ref": "#"}, {}])
    fresh = count < 60 and r.random() < 0.5
    schema: dict[str, Any] = {"type": "object", "properties": {n: _leaf(r) if fresh else value for n in names}}
    extras = {
        "required": r.sample(names, r.randint(0, count)),
        "additionalProperties": r.choice([False, {"type": "integer"}, True]),
        "patternProperties": {_regex(r, 500): {}, "^p[0-9]{1,900}$": {}},
        "minProperties": r.randint(0, count),
    }
    return json.dumps(schema | {key: extra for key, extra in extras.items() if r.random() < 0.4})


def _enum(r: Random) -> str:
    values: list[Any] = list(_words(r))
    if r.random() < 0.5:
        values = [r.choice([w, i, i / 7, [w], {w: i}, None]) for i, w in enumerate(values)]
    schema = {"enum": values}
    return json.dumps(r.choice([schema, {"type": "array", "items": schema, "minItems": 30}, {"anyOf": [schema] * 3}]))


def _refs(r: Random) -> str:
    names = [f"d{i}" for i in range(_size(r, 1500))]

    def link(i: int) -> Schema:
        near, far = ({"$ref": f"#/$defs/{name}"} for name in (names[(i + 1) % len(names)], r.choice(names)))
        wrong = ["#", "#/$defs/none", "http://x.test/y", "file:///etc/passwd", "#/$defs", "%%"]
        joined: list[Schema] = [{kind: [near, far]} for kind in ("anyOf", "oneOf", "allOf")]
        inner: list[Schema] = [{"type": "array", "items": far}, {"type": "object", "properties": {"a": near, "b": far}}]
        return r.choice([near, *joined, *inner, {"$ref": r.choice(wrong)}, {"type": "null"}])

    return json.dumps({"$ref": "#/$defs/d0", "$defs": {name: link(i) for i, name in enumerate(names)}})


def _combine(r: Random) -> str:
    """Each level multiplies what the one below has."""

    def make(depth: int) -> Schema:
        if depth == 0:
            return _leaf(r)
        count = r.randint(1, 6)
        if r.random() < 0.3:
            return {"type": "object", "properties": {_word(r): make(depth - 1) for _ in range(count)}}
        return {r.choice(["anyOf", "oneOf", "allOf"]): [make(depth - 1) for _ in range(count)]}

    return json.dumps(make(r.randint(1, 5)))


def _product(r: Random) -> str:
    """allOf of many anyOf: the product of their sizes, written out."""
    width, kind = r.randint(2, 9), r.choice(["anyOf", "oneOf"])

    def part(i: int, j: int) -> Schema:
        kinds: list[Schema] = [{"properties": {f"k{i}": {"const": j}}}, {"required": [f"k{j}"]}]
        return r.choice([*kinds, {"pattern": f"{i}.*{j}"}])

    parts = [{kind: [part(i, j) for j in range(width)]} for i in range(_size(r, 200))]
    return json.dumps({"type": r.choice(["object", "string"]), "allOf": parts})


def _patterns(r: Random) -> str:
    parts = [{"pattern": _regex(r)} for _ in range(_size(r, 20))]
    schema = {"type": "string", "allOf": parts, "minLength": r.choice([0, 5, 5000]), "maxLength": 9000}
    return json.dumps(r.choice([schema, {"type": "array", "items": schema}, {"type": "string", **parts[0]}]))


def _items(r: Random) -> str:
    items = [_leaf(r) for _ in range(_size(r, 60))] * _size(r, 40)
    least, more = {"type": "array", "minItems": _size(r, 10**7)}, {"prefixItems": items, "items": r.choice([False, {}])}
    return json.dumps(r.choice([items[0], {**least, "items": items[0]}, {**least, **more}]))


def _wrong_schema(r: Random) -> str:
    options = {"whitespace_pattern": _regex(r), "item_separator": "a*", "lenient": True}
    written = ["{", "[" * 60_000, "null", "7", '"a"', '{"a":' + "1" * 60_000 + "}", '{"type":"\\ud800"}']
    values = [
        {"type": _word(r)},
        {"type": "object", "properties": 5},
        {"type": "string", "minLength": -1, "maxLength": 1e308},
        {"type": "array", "minItems": 2**64},
        {"$schema": "http://x.test/none", "if": {}, "then": {}, "else": False},
        {"type": "object", "dependentRequired": {"a": ["b"]}, "propertyNames": {"pattern": "a"}},
        {"type": "object", "x-guidance": options},
    ]
    return r.choice([*written, *map(json.dumps, values)])


SCHEMAS = [_deep, _properties, _enum, _refs, _combine, _product, _patterns, _items, _wrong_schema]

# Lark


def _recursion(r: Random) -> str:
    grammars = [
        "start: start",
        'start: start start | "a" |',
        'start: x\nx: x x | x x x | "a" | "aa" |',
        'start: x*\nx: y*\ny: "a"*',
        'start: x "b"\nx: "a" x | x "a" | "a"',
        'start: T\nT: T "a"',
        'start: e\ne: e "+" e | e "*" e | "(" e ")" | /[0-9]+/ | /[0-9]*/',
        'start: x{9000}\nx: y{9000}\ny: "a"{9000}',
        f"start: /[xz]{{{r.randint(0, 99)}}}/ y\ny: /a*/ y",  # never comes back from y
    ]
    return r.choice(grammars)


def _ambiguous(r: Random) -> str:
    rules = [f"r{i}" for i in range(_size(r, 1500))]
    bodies = ["/a*/", "/[ab]+/", '"ab"', "/.{0,90}/"]
    lines = [f"{rule}: {r.choice(bodies)} {' '.join(r.choices(rules, k=r.randint(0, 2)))}" for rule in rules]
    return "\n".join(["start: " + " | ".join(rules), *lines])


def _terminals(r: Random) -> str:
    count = _size(r, 900)
    lines = [f"T{i}: /{_regex(r, _size(r, 3000))}/" for i in range(count)]
    return "\n".join(["start: " + r.choice([" | ", " ", "? "]).join(f"T{i}" for i in range(count)), *lines])


def _one_terminal(r: Random) -> str:
    return f"start: {r.choice(['T', 'T*', 'T+ T', 'T~3..900', '(T T)? T'])}\nT: /{_regex(r, MAX_BYTES)}/"


def _intersections(r: Random) -> str:
    parts = [r.choice(["", "~"]) + f"/{_regex(r)}/" for _ in range(r.randint(2, 12))]
    far = [f"/(.|\\n)*{r.choice('abc')}(.|\\n){{{_size(r, 900)}}}/" for _ in range(r.randint(2, 12))]
    return "start: T\nT: " + " & ".join(r.choice([parts, far]))


def _repeats(r: Random) -> str:
    text = r.choice(['"a"', "/[a-z]/", "/.*/", "x", '("a"|"b")'])
    for _ in range(r.randint(1, 5)):
        text = f"({text}){r.choice(['{%d}', '{0,%d}', '~%d', '{%d,}']) % _size(r, 20_000)}"
    return f'start: {text}\nx: "a" x | "b"'


def _long_rule(r: Random) -> str:
    part = r.choice(['"a" ', '("a"|"b") ', "x? ", "x* ", "/a?/ ", '["a"] '])
    return "start: " + part * _size(r, 15_000) + '\nx: "x" | "xx"'


def _deep_lark(r: Random) -> str:
    depth = _size(r, 15_000)
    left, right = r.choice([("(", ")"), ('("a"|', ")"), ("[", "]"), ("(", ")*"), ('"a" (', ")?")])
    return "start: " + left * depth + '"b"' + right * depth


def _chain(r: Random) -> str:
    """A rule for each level: thousands of them overflow llguidance's stack, and double the terminal with each."""
    count, name = _size(r, 4500), r.choice("rR")
    form = r.choice(["{0}: {1}", '{0}: {1} | "a"', "{0}: {1} {1}", "{0}: {1}? {1}?", "{0}: {1}?"])
    lines = [form.format(f"{name}{i}", f"{name}{i + 1}") for i in range(count)]
    return "\n".join([f"start: {name}0", *lines, f'{name}{count}: "a"'])


def _embedded(r: Random) -> str:
    schema, regex, chars = r.choice(SCHEMAS)(r), _regex(r, 500), json.dumps("ab cd " * _size(r, 9000))
    grammars: list[dict[str, Any]] = [{"lark_grammar": f"start: /{regex}/"}] * r.randint(1, 20)
    loop = [{"lark_grammar": "start: @b"}, {"name": "b", "lark_grammar": "start: @b"}]
    texts = [
        f"start: %json {schema}",
        f"start: x x x\nx: %json {schema}",
        json.dumps({"grammars": r.choice([grammars, loop]), "test_trace": True}),
        f'start: %regex {{"substring_{r.choice(["chars", "words"])}": {chars}}}',
        '%llguidance {"no_forcing": true, "allow_invalid_utf8": true}\nstart: /(?s:.)*/',
        f"start: x\nx[max_tokens={_size(r, 10**9)},stop=/{regex}/]: /.*/",
        f"start: x\nx[suffix=/{regex}/,capture,temperature=9e99]: /.*/",
        f'%ignore /{regex}/\nstart: "a" "b" "c"',
        f'start: r::{_size(r, 2**40)}\nr::_ : "a" r::incr(_)\n  | r::decr(_) %if lt(_, 9999)',
        "start: <[*]> <|x|> <[0-999999999]>",
        '%import common.INT\nstart: INT "a"i',
    ]
    return r.choice(texts)


def _wrong_lark(r: Random) -> str:
    pieces = [*":|x\n()[]~{}%@<>&?\0é", "start", '"a"', "/a/", "::", "//", "->"]
    return "start: " + " ".join(r.choices(pieces, k=_size(r, 9000)))


LARKS = [
    *(_recursion, _ambiguous, _terminals, _one_terminal, _intersections, _repeats),
    *(_long_rule, _deep_lark, _chain, _embedded, _wrong_lark),
]
