"""Generated hostile input on every route that takes some: broken bodies, grammars, heads.

Whatever comes in, the server answers in few words with no 5xx but 503 (501 where a route is not there), lives, and is
idle in the end. Every case is from a fixed seed.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import hostile
import pytest
from wire import CHAT, COMPLETION, NUMBERS, Attacked, Case, attack, attacked, share

from squawq.serve.app import ROUTES


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    """A server whose complete answers are short too."""
    flags = "--max-model-len 64 --max-choices 2 --max-prompts 2 --max-logprobs 2 --header-timeout 1 --body-timeout 1"
    with attacked(tmp_path_factory.mktemp("home"), *flags.split(), "--tool-call-parser", "hermes") as found:
        yield found


# Bodies


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
RICH: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}, "n": 2, "seed": 3}),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "stop": ["a"], "logit_bias": {"5": 1}}),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}),
    ("/v1/chat/completions", {**CHAT, "tool_choice": "required", "tools": [TOOL]}),
    ("/v1/completions", {**COMPLETION, "echo": True, "logprobs": 1, "prompt": [5, 6, 7]}),
    ("/v1/completions", {**COMPLETION, "prompt": ["a", "b"], "stream": True, "structured_outputs": {"choice": ["a"]}}),
    ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 2, "details": True, "top_n_tokens": 2, "seed": 1}}),
    ("/generate_stream", {"inputs": "a", "parameters": {"max_new_tokens": 2, "stop": ["b"], "temperature": 0.5}}),
    ("/", {"inputs": "a", "parameters": {"max_new_tokens": 2, "best_of": 2, "do_sample": True}, "stream": False}),
    ("/invocations", CHAT),
    ("/tokenize", {"prompt": "a", "return_token_strs": True}),
    ("/tokenize", {"inputs": "a", "parameters": {"truncate": 3}}),
    ("/detokenize", {"tokens": [5, 6]}),
    ("/chat_tokenize", CHAT),
    ("/v1/embeddings", {"input": "a"}),
]
FIELDS = sorted({name for row in ROUTES.values() for model in row.bodies for name in model.model_fields})
WORDS = ["", "a", "auto", "json", "\u0000", "<tool_call>", "{{ 7 * 7 }}", "é" * 300, "../../etc/passwd", "a" * 1000]
JUNK = [*NUMBERS[:28], "null", "false", "[]", "{}", "[[]]", '[{"":[]}]', "[" * 99 + "]" * 99, r'"\ud800"', r'"\udc00a"']
JUNK += [
    *map(json.dumps, WORDS),
    '{"a":1,"a":2}',
    '["a",1,null]',
    "[" * 300 + "]" * 300,
    '{"type":"function"}',
    "tru",
    "'a'",
]


def broken(draw: random.Random) -> Case:
    """A body that is wrong in a place or two, or no JSON at all."""
    path, body = draw.choice(RICH)
    for _ in range(draw.choice((1, 1, 2, 3))):
        spots = list(_spots(body))
        spot = draw.choice(spots) if spots else ()
        if spot and draw.random() < 0.2:
            body = _changed(body, spot, None)
        elif draw.random() < 0.4:
            body = {**body, draw.choice(FIELDS): f"@{draw.choice(JUNK)}@"} if isinstance(body, dict) else body
        else:
            body = _changed(body, spot, lambda: f"@{draw.choice(JUNK)}@")
    raw = re.sub(r'"@(.*?)@"', lambda found: json.loads(f'"{found[1]}"'), json.dumps(body)).encode("utf-8", "replace")
    return path, draw.choice(DAMAGES)(raw, draw) if draw.random() < 0.3 else raw


def _spots(body: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from _spots(value, (*path, key))


def _changed(body: Any, path: tuple[Any, ...], value: Callable[[], str] | None) -> Any:
    """A body with another value at a path, or without what is there."""
    if not path:
        return body if value is None else value()
    inner = dict(body) if isinstance(body, dict) else list(body)
    if len(path) == 1 and value is None:
        del inner[path[0]]
    else:
        inner[path[0]] = _changed(inner[path[0]], path[1:], value)
    return inner


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    lambda raw, draw: raw[: draw.randrange(len(raw) + 1)],
    lambda raw, draw: raw[(place := draw.randrange(len(raw) + 1)) :] + raw[:place],
    lambda raw, draw: raw + raw,
    lambda raw, draw: b"\xef\xbb\xbf" + raw,
    lambda raw, draw: raw.decode("utf-8", "replace").encode("utf-16"),
    lambda raw, draw: raw.replace(b'"', b"'", draw.randrange(1, 5)),
    lambda raw, draw: raw.replace(b":", bytes([draw.randrange(256)]), 1),
    lambda raw, draw: bytes(byte ^ (1 << draw.randrange(8)) if draw.random() < 0.02 else byte for byte in raw),
    lambda raw, draw: draw.randbytes(draw.randrange(300)),
    lambda raw, draw: b"[" * draw.randrange(100_000),
    lambda raw, draw: b'{"a":' * draw.randrange(1000) + raw + b"}" * draw.randrange(1000),
    lambda raw, draw: b"",
]


def test_broken_bodies(target: Attacked) -> None:
    """Hundreds of bodies, each wrong in its own way."""
    draw = random.Random("bodies")
    replies = attack(target, [broken(draw) for _ in range(1500)])
    assert 0.03 < share(replies, 200) < 0.6
    assert share(replies, 400, 422) > 0.3
    assert sum(reply.status == 501 for reply in replies) > 20


# Grammars


def grammar_cases(count: int, seed: int) -> Iterator[Case]:
    """Hostile regexes, schemas and Lark grammars in every form in which a request may bring them."""
    steps = {"max_tokens": 3}
    for text in hostile.regexes(count, seed):
        yield "/v1/completions", json.dumps({**COMPLETION, **steps, "structured_outputs": {"regex": text}}).encode()
    for text in hostile.larks(count, seed):
        yield "/v1/completions", json.dumps({**COMPLETION, **steps, "structured_outputs": {"grammar": text}}).encode()
    for number, text in enumerate(hostile.schemas(count, seed)):
        function = f'{{"name":"f","parameters":{text}}}'
        tool = f'"tool_choice":"required","tools":[{{"type":"function","function":{function}}}]'
        grammar = f'{{"max_new_tokens":3,"grammar":{{"type":"json","value":{text}}}}}'
        forms = (
            ("/v1/completions", json.dumps({**COMPLETION, **steps, "structured_outputs": {"json": text}})),
            ("/v1/chat/completions", _with(CHAT, tool)),
            ("/v1/chat/completions", _with(CHAT, f'"response_format":{{"type":"json_object","value":{text}}}')),
            ("/generate", f'{{"inputs":"a","parameters":{grammar}}}'),
        )
        path, body = forms[number % len(forms)]
        yield path, body.encode("utf-8", "replace")


def _with(body: dict[str, Any], more: str) -> str:
    return f"{json.dumps(body)[:-1]},{more}}}"


def test_hostile_grammars(target: Attacked) -> None:
    """CVE-2025-71379, PYSEC-2025-54: a hundred each of grammars that try to cost much."""
    replies = attack(target, list(grammar_cases(100, seed=7)))
    assert 0.1 < share(replies, 200) < 0.9


# Heads


def head(draw: random.Random) -> bytes:
    """A request whose head is wrong in some places, and whose body has the length that it should have."""

    def piece() -> bytes:
        return draw.choice(BROKEN if draw.random() < 0.15 else STRANGE)

    path, value = draw.choice(RICH)
    body = json.dumps(value).encode()
    line = [b"POST", b" ", path.encode(), b" ", b"HTTP/1.1", b"\r\n"]
    headers = [(b"host", b"a"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if draw.random() < 0.3:
        line[draw.choice((0, 2, 2, 4, 1))] = piece()
    for _ in range(draw.choice((0, 1, 1, 2))):
        name, text = draw.choice(headers)
        headers[draw.randrange(len(headers))] = draw.choice(((name, piece()), (piece(), text), draw.choice(ODD)))
    if draw.random() < 0.2:
        headers += [(b"x-%d" % draw.randrange(9), piece()) for _ in range(draw.choice((1, 9, 400)))]
    end = b"\r\n" if draw.random() < 0.95 else draw.choice((b"\n", b"\r", b"\r\n ", b"\x00\r\n"))
    return b"".join(line) + b"".join(name + b": " + text + end for name, text in headers) + b"\r\n" + body


BROKEN = [b"", b" ", b"\t", b"\x00", b"\r", b"\n", b"\x7f", b":", b"{}", b"HTTP/9.9", b"\xff\xfe"]
STRANGE = [b"*", b"/", b"//", b"/%", b"/%zz", b"/..%2f", b"/metrics", b"GET", b"HEAD", b"OPTIONS", b"CONNECT", b"BREW"]
STRANGE += [b"a" * 5000, b"HTTP/1.0", b"7", b"application/json", b"text/plain", b"Application/JSON; charset=utf-16"]
ODD = [
    (b"expect", b"100-continue"),
    (b"expect", b"a miracle"),
    (b"upgrade", b"websocket\r\nconnection: upgrade\r\nsec-websocket-key: a\r\nsec-websocket-version: 13"),
    (b"upgrade", b"h2c\r\nconnection: upgrade, http2-settings\r\nhttp2-settings: AAAA"),
    (b"connection", b"close, keep-alive, upgrade, content-length"),
    (b"accept", b"application/openmetrics-text;q=a, */*;;;"),
    (b"accept-encoding", b"gzip, br, zstd, *;q=0"),
    (b"content-encoding", b"gzip"),
    (b"range", b"bytes=0-99999999999999999999,-1"),
    (b"origin", b"http://evil.test\r\naccess-control-request-method: POST"),
    (b"x-request-id", b"a b\x01" + b"c" * 300),
    (b"te", b"trailers, deflate;q=0.5"),
    (b"transfer-encoding", b"chunked"),
    (b"cookie", b"a=b; " * 900),
]


def test_hostile_heads(target: Attacked) -> None:
    """Hundreds of requests whose lines and headers no client would send."""
    draw = random.Random("heads")
    replies = attack(target, [("", head(draw)) for _ in range(600)], clients=24)
    assert share(replies, 200) > 0.1
    assert share(replies, 0, 400) > 0.1
    assert share(replies, 404, 405, 415, 422, 501) > 0.1
