"""Grammars that try to cost much time or memory: regexes, JSON schemas and Lark grammars, from a seed. Many are wrong.

What a grammar may do is the same in each: be refused, or be compiled and used, in little time. Knows no compiler.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

MAX_BYTES = 64 * 1024
ATOMS = ["a", "ab", ".", "[a-z]", "[^a]", r"\w", r"\d", r"\s", r"\S", r"\p{L}", r"\p{Greek}", "(a|b)", "(a|a)", "é", r"\x00", "(?i:k)"]
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


def _draw(kinds: Sequence[Callable[[Random], str]], n: int, random: Random) -> list[str]:
    """Each kind in its turn, cut to the size that a grammar may have."""
    texts = (kinds[i % len(kinds)](random) for i in range(n))
    return [text.encode("utf-8", "surrogatepass")[:MAX_BYTES].decode("utf-8", "ignore") or "x" for text in texts]


def _size(random: Random, most: int, least: int = 1) -> int:
    """Small as often as large."""
    return round(least * (most / least) ** random.random())


def _word(random: Random, letters: str = "abcdefgh", most: int = 12) -> str:
    return "".join(random.choices(letters, k=random.randint(1, most)))


def _words(random: Random, most: int = 6000) -> list[str]:
    start, end = _word(random), _word(random)
    count = _size(random, most)
    return [
        random.choice([_word(random, "ab", 20), start + _word(random), _word(random) + end, str(i)]) for i in range(count)
    ]


# Regexes


def _nested_counts(random: Random) -> str:
    text = random.choice(ATOMS)
    for _ in range(random.randint(1, 7)):
        low = _size(random, 3000)
        text = f"({text}{random.choice(['', random.choice(ATOMS)])}){{{random.choice([0, 1, low])},{low + _size(random, 3000)}}}"
    return text


def _big_count(random: Random) -> str:
    count = _size(random, 10**random.randint(1, 10))
    form = random.choice(["{%d}", "{0,%d}", "{%d,}", "{1,%d}"]) % count
    return random.choice(["", "x", ".*"]) + random.choice(ATOMS) + form + random.choice(["", "x", ".*x"])


def _alternation(random: Random) -> str:
    text = "(" + "|".join(_words(random)) + ")"
    return text + random.choice(["", "*", "+", "?", "{3,90}", "*" + text, ".*" + text])


def _backtracking(random: Random) -> str:
    inner = random.choice(["(a|a)*", "(a*)*", "(a+)+", "(a|aa)+", "(.*)*", "(a|b|ab)*", "(.*a){12}", "(a?){30}a{30}"])
    return inner * _size(random, 3000) + random.choice(["b", "", "$", "!"])


def _many_states(random: Random) -> str:
    """A deterministic automaton of these has 2^k states."""
    k = _size(random, 4000)
    far = f"(.*a.{{{k}}}|.*b.{{{k + 7}}}c)"
    return random.choice([f"(a|b)*a(a|b){{{k}}}", f".*a.{{{k}}}", far, f"{far}{far}x", f"[^x]*[ab][^y]{{{k}}}z"])


def _contains(random: Random) -> str:
    return random.choice(["", "(?i)", "(?s)"]) + "(" + "|".join(f".*{w}.*" for w in _words(random, 600)) + ")"


def _optional(random: Random) -> str:
    count = _size(random, 8000)
    return random.choice([r"\w?", "a?", ".?", "[ab]*", "(ab?)?", ".*", r"\d+"]) * count + "a" * random.randint(0, count)


def _unicode(random: Random) -> str:
    names = ["L", "Lu", "N", "P", "S", "Han", "Cyrillic", "Emoji", "Cn", "Any"]
    part = "".join(f"[\\p{{{random.choice(names)}}}--a]" if random.random() < 0.1 else f"\\p{{{random.choice(names)}}}"
                   f"{{{random.randint(0, 3)},{_size(random, 3000, 4)}}}" for _ in range(_size(random, 60)))
    return random.choice(["", "(?i)"]) + part + random.choice(["", r"[\u{10000}-\u{10ffff}]*", r"\W{5,500}", "(?i)ß{1,99}"])


def _brackets(random: Random) -> str:
    depth = _size(random, 30_000)
    left, right = random.choice([("(", ")"), ("(a|", ")"), ("(", ")*"), ("(?:", "){1,2}"), ("[", "]"), ("(a", ")?")])
    return left * depth + "a" + right * (depth - random.choice([0, 0, 1]))


def _random_regex(random: Random) -> str:
    def make(depth: int) -> str:
        if depth == 0:
            return random.choice(ATOMS)
        parts = [make(depth - 1) for _ in range(random.randint(1, 4))]
        joined = random.choice(["", "|"]).join(parts)
        return f"({joined})" + random.choice(["", "*", "+", "?", f"{{{random.randint(0, 40)},{_size(random, 9000, 40)}}}"])

    return make(random.randint(1, 6))


def _wrong_regex(random: Random) -> str:
    pieces = ["(", ")", "[", "]", "{", "}", "*", "\\", "|", "?", "(?=", "(?<a>", "\\1", "\\b", "^", "$", "\0", "\n", "/", "é", "\U0001f600", "a", "9999999999999999999999", ",", "&", "~"]
    return "".join(random.choices(pieces, k=_size(random, 20_000)))


REGEXES = [
    _nested_counts,
    _big_count,
    _alternation,
    _backtracking,
    _many_states,
    _contains,
    _optional,
    _unicode,
    _brackets,
    _random_regex,
    _wrong_regex,
]

# JSON schemas


def _deep(random: Random) -> str:
    depth = _size(random, 6000)
    left, right = random.choice([
        ('{"items":', "}"),
        ('{"properties":{"a":', "}}"),
        ('{"anyOf":[', "]}"),
        ('{"allOf":[{"type":"object"},', "]}"),
        ('{"not":', "}"),
        ('{"additionalProperties":', "}"),
        ('{"prefixItems":[{},', '],"minItems":2}'),
        ('{"oneOf":[{"type":"null"},', "]}"),
        ("[", "]"),
    ])  # fmt: skip
    return left * depth + random.choice(["{}", "true", '{"type":"string"}']) + right * depth


def _leaf(random: Random) -> Schema:
    big = _size(random, 10 ** random.randint(1, 12))
    number = random.choice([1, 0.1, 1e-9, 7, 1e300, 123456789, 0, -3, 2**53 + 1, 1e-320])
    return random.choice([
        {"type": "string", "minLength": random.choice([0, big]), "maxLength": big * random.choice([1, 2])},
        {"type": "string", "pattern": random.choice(REGEXES)(random)[:3000]},
        {"type": "string", "pattern": _word(random), "minLength": big, "format": "date"},
        {"type": "array", "minItems": random.choice([0, big]), "maxItems": big * 2},
        {"type": "array", "items": {"enum": _words(random, 90)}, "minItems": big % 5000, "uniqueItems": True},
        {"type": "integer", "minimum": -big, "maximum": big, "multipleOf": number},
        {"type": "number", "exclusiveMinimum": number, "maximum": big, "multipleOf": random.choice([0.01, 3, 1e-7])},
        {"type": "object", "minProperties": big % 900, "maxProperties": big},
        {"type": "string", "format": random.choice(["date-time", "uuid", "email", "ipv6", "uri", "regex", "nope"])},
        {"const": random.choice([None, big, "x" * (big % 9000), [1] * (big % 900)])},
        {"enum": []},
        {"type": "string", "minLength": 9, "maxLength": 2},
        {"type": ["string", "integer", "null", "array", "object"]},
        True,
        False,
    ])  # fmt: skip


def _properties(random: Random) -> str:
    count = _size(random, 4000)
    names = [random.choice([f"p{i}", "p" * (i % 70 + 1) + str(i), _word(random) + str(i)]) for i in range(count)]
    values = random.choice([lambda: {"type": "string"}, lambda: _leaf(random) if count < 60 else {}, lambda: {"$ref": "#"}])
    schema: dict[str, Any] = {"type": "object", "properties": {name: values() for name in names}}
    if random.random() < 0.5:
        schema["required"] = random.sample(names, random.randint(0, count))
    if random.random() < 0.5:
        schema["additionalProperties"] = random.choice([False, {"type": "integer"}, True])
    if random.random() < 0.3:
        schema["patternProperties"] = {random.choice(REGEXES)(random)[:500]: {}, "^p[0-9]{1,900}$": {}}
    if random.random() < 0.3:
        schema["minProperties"] = random.randint(0, count)
    return json.dumps(schema)


def _enum(random: Random) -> str:
    values: list[Any] = list(_words(random))
    if random.random() < 0.5:
        values = [random.choice([w, i, i / 7, [w], {w: i}, None]) for i, w in enumerate(values)]
    schema = {"enum": values}
    return json.dumps(random.choice([schema, {"type": "array", "items": schema, "minItems": 30}, {"anyOf": [schema] * 3}]))


def _refs(random: Random) -> str:
    count = _size(random, 1500)
    names = [f"d{i}" for i in range(count)]

    def link(i: int) -> dict[str, Any]:
        near, far = names[(i + 1) % count], random.choice(names)
        return random.choice([
            {"$ref": f"#/$defs/{near}"},
            {"anyOf": [{"$ref": f"#/$defs/{near}"}, {"$ref": f"#/$defs/{far}"}]},
            {"allOf": [{"$ref": f"#/$defs/{near}"}, {"$ref": f"#/$defs/{far}"}]},
            {"type": "array", "items": {"$ref": f"#/$defs/{far}"}},
            {"type": "object", "properties": {"a": {"$ref": f"#/$defs/{near}"}, "b": {"$ref": f"#/$defs/{far}"}}},
            {"$ref": random.choice(["#", "#/$defs/none", "http://x.test/y", "file:///etc/passwd", "#/$defs", "%%"])},
            {"type": "null"},
        ])  # fmt: skip

    return json.dumps({"$ref": "#/$defs/d0", "$defs": {name: link(i) for i, name in enumerate(names)}})


def _combine(random: Random) -> str:
    """Each level multiplies what the one below has."""

    def make(depth: int) -> Schema:
        if depth == 0:
            return _leaf(random)
        count = random.randint(1, 6)
        if random.random() < 0.3:
            return {"type": "object", "properties": {_word(random): make(depth - 1) for _ in range(count)}}
        return {random.choice(["anyOf", "oneOf", "allOf"]): [make(depth - 1) for _ in range(count)]}

    return json.dumps(make(random.randint(1, 5)))


def _product(random: Random) -> str:
    """allOf of many anyOf: the product of their sizes in plain form."""
    width, factors = random.randint(2, 9), _size(random, 200)
    kind = random.choice(["anyOf", "oneOf"])
    parts = [
        {kind: [random.choice([{"properties": {f"k{i}": {"const": j}}}, {"pattern": f"{i}.*{j}"}, {"required": [f"k{j}"]}])
                for j in range(width)]}
        for i in range(factors)
    ]  # fmt: skip
    return json.dumps({"type": random.choice(["object", "string"]), "allOf": parts})


def _patterns(random: Random) -> str:
    parts = [{"pattern": random.choice(REGEXES)(random)[:2000]} for _ in range(_size(random, 20))]
    schema = {"type": "string", "allOf": parts, "minLength": random.choice([0, 5, 5000]), "maxLength": 9000}
    return json.dumps(random.choice([schema, {"type": "array", "items": schema}, {"type": "string", **parts[0]}]))


def _one_leaf(random: Random) -> str:
    leaf = _leaf(random)
    return json.dumps(random.choice([leaf, {"type": "array", "items": leaf, "minItems": _size(random, 10**7)}]))


def _prefix_items(random: Random) -> str:
    items = [_leaf(random) for _ in range(_size(random, 60))] * _size(random, 40)
    return json.dumps({"type": "array", "prefixItems": items, "items": random.choice([False, {}]), "minItems": len(items)})


def _wrong_schema(random: Random) -> str:
    options = {"x-guidance": {"whitespace_pattern": random.choice(REGEXES)(random)[:2000], "lenient": True}}
    return random.choice([
        "{",
        "[" * 60_000,
        "null",
        "7",
        '"a"',
        json.dumps({"type": _word(random)}),
        json.dumps({"type": "object", "properties": 5}),
        json.dumps({"minLength": -1, "type": "string"}),
        json.dumps({"type": "string", "maxLength": 1e308}),
        json.dumps({"type": "array", "minItems": 2**64}),
        json.dumps({"$schema": "http://x.test/none", "if": {}, "then": {}, "else": False}),
        json.dumps({"type": "object", "dependentRequired": {"a": ["b"]}, "propertyNames": {"pattern": "a"}}),
        json.dumps({**options, "type": "object"}),
        '{"a":' + "1" * 60_000 + "}",
        '{"type":"\\ud800"}',
    ])  # fmt: skip


SCHEMAS = [
    _deep,
    _one_leaf,
    _properties,
    _enum,
    _refs,
    _combine,
    _product,
    _patterns,
    _prefix_items,
    _wrong_schema,
]

# Lark


def _recursion(random: Random) -> str:
    return random.choice([
        "start: start",
        'start: start start | "a" |',
        'start: x\nx: x x | x x x | "a" | "aa" |',
        'start: x*\nx: y*\ny: "a"*',
        'start: a\na: b | "x"\nb: a | "y"',
        'start: (("a"?)*)*',
        'start: x "b"\nx: "a" x | x "a" | "a"',
        'start: T\nT: T "a"',
        'start: e\ne: e "+" e | e "*" e | "(" e ")" | /[0-9]+/ | /[0-9]*/',
        "start: x{9000}\nx: y{9000}\ny: \"a\"{9000}",
    ])  # fmt: skip


def _ambiguous(random: Random) -> str:
    count = _size(random, 1500)
    rules = [f"r{i}" for i in range(count)]
    lines = ["start: " + " | ".join(rules)]
    for rule in rules:
        tail = random.choice(["", random.choice(rules), f"{random.choice(rules)} {random.choice(rules)}"])
        lines.append(f'{rule}: {random.choice(["/a*/", "/[ab]+/", chr(34) + _word(random, "ab") + chr(34), "/.{0,90}/"])} {tail}')
    return "\n".join(lines)


def _terminals(random: Random) -> str:
    count = _size(random, 900)
    bodies = [random.choice(REGEXES)(random).replace("/", "")[: _size(random, 3000)] for _ in range(count)]
    lines = [f"T{i}: /{body}/" for i, body in enumerate(bodies)]
    return "start: " + random.choice([" | ", " ", "? "]).join(f"T{i}" for i in range(count)) + "\n" + "\n".join(lines)


def _one_terminal(random: Random) -> str:
    body = random.choice(REGEXES)(random).replace("/", "").replace("\n", "")
    return f"start: {random.choice(['T', 'T*', 'T+ T', 'T~3..900', '(T T)? T'])}\nT: /{body}/"


def _intersections(random: Random) -> str:
    parts = [
        random.choice(["", "~"]) + f"/{random.choice(REGEXES)(random).replace('/', '')[:2000]}/"
        for _ in range(random.randint(2, 12))
    ]
    far = [f"/(.|\\n)*{random.choice('abc')}(.|\\n){{{_size(random, 900)}}}/" for _ in range(random.randint(2, 12))]
    return "start: T\nT: " + " & ".join(random.choice([parts, far]))


def _repeats(random: Random) -> str:
    text = random.choice(['"a"', "/[a-z]/", "/.*/", "x", '("a"|"b")'])
    for _ in range(random.randint(1, 5)):
        count = _size(random, 20_000)
        text = f"({text}){random.choice([f'{{{count}}}', f'{{0,{count}}}', f'~{count}', f'{{{count},}}'])}"
    return f'start: {text}\nx: "a" x | "b"'


def _long_rule(random: Random) -> str:
    part = random.choice(['"a" ', '("a"|"b") ', "x? ", "x* ", "/a?/ ", '["a"] '])
    return "start: " + part * _size(random, 15_000) + '\nx: "x" | "xx"'


def _deep_lark(random: Random) -> str:
    depth = _size(random, 15_000)
    left, right = random.choice([("(", ")"), ('("a"|', ")"), ("[", "]"), ("(", ")*"), ('"a" (', ")?")])
    return "start: " + left * depth + '"b"' + right * depth


def _chain(random: Random) -> str:
    count = _size(random, 4000)
    form = random.choice(["r{0}: r{1}", 'r{0}: r{1} | "a"', 'r{0}: r{1} r{1}', "r{0}: r{1}? r{1}?", "R{0}: R{1} R{1}", "R{0}: R{1}?"])
    start = "R0" if form.startswith("R") else "r0"
    last = start[0] + str(count)
    return f"start: {start}\n" + "\n".join(form.format(i, i + 1) for i in range(count)) + f'\n{last}: "a"'


def _embedded(random: Random) -> str:
    schema, regex = random.choice(SCHEMAS)(random), random.choice(REGEXES)(random)
    return random.choice([
        f"start: %json {schema}",
        f"start: x x x\nx: %json {schema}",
        json.dumps({"grammars": [{"name": "a", "json_schema": {}}], "test_trace": True}),
        json.dumps({"grammars": [{"lark_grammar": f"start: /{regex}/"}] * random.randint(1, 20)}),
        json.dumps({"grammars": [{"lark_grammar": "start: @b"}, {"name": "b", "lark_grammar": "start: @b"}]}),
        'start: %regex {"substring_chars": ' + json.dumps("ab" * _size(random, 9000)) + "}",
        'start: %regex {"substring_words": ' + json.dumps("ab cd " * _size(random, 9000)) + "}",
        '%llguidance {"no_forcing": true, "allow_invalid_utf8": true}\nstart: /(?s:.)*/',
        f"start: x\nx[max_tokens={_size(random, 10**9)},stop=/{regex[:500]}/]: /.*/",
        f"start: x\nx[suffix=/{regex[:500]}/,capture,temperature=9e99]: /.*/",
        "%ignore /" + regex.replace("/", "")[:2000] + '/\nstart: "a" "b" "c"',
        f"start: r::{_size(random, 2**40)}\nr::_ : \"a\" r::incr(_)\n  | r::decr(_) %if lt(_, 9999)",
        "start: <[*]> <|x|> <[0-999999999]>",
        '%import common.INT\nstart: INT "a"i',
    ])  # fmt: skip


def _wrong_lark(random: Random) -> str:
    pieces = ["start", ":", "|", '"a"', "/a/", "x", "\n", "(", ")", "[", "]", "~", "{", "}", "%", "@", "::", "<", ">", "&", "\0", "é", "//", "->", "?"]
    return "start: " + " ".join(random.choices(pieces, k=_size(random, 9000)))


LARKS = [
    _recursion,
    _ambiguous,
    _terminals,
    _one_terminal,
    _intersections,
    _repeats,
    _long_rule,
    _deep_lark,
    _chain,
    _embedded,
    _wrong_lark,
]
