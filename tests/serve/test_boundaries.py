"""Numbers, ids and texts at every boundary, in every field that takes one: refused or used, and the engine lives.

The fields are those of the bodies' own classes, so a new one is tried too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from running import MESSAGES, Running
from wire import CHAT, COMPLETION, GENERATE, NUMBERS, Attacked, Case, Wire, attack, attacked, share

from squawq.serve.app import ROUTES


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with attacked(tmp_path_factory.mktemp("home"), "--max-model-len", "64") as found:
        yield found


ROOTS = {"ChatBody": CHAT, "TokenizeChatBody": CHAT, "CompletionBody": COMPLETION, "GenerateBody": GENERATE}


def places(schema: Any, definitions: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where a body of a JSON schema may have a number."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rsplit("/", 1)[1]]
    for option in schema.get("anyOf", ()):
        yield from places(option, definitions, path)
    if schema.get("type") in ("integer", "number"):
        yield path
    for name, inner in schema.get("properties", {}).items():
        yield from places(inner, definitions, (*path, name))
    if isinstance(items := schema.get("items"), dict):
        yield from places(items, definitions, (*path, 0))
    if isinstance(values := schema.get("additionalProperties"), dict):
        yield from places(values, definitions, (*path, "5"))


def placed(body: Any, path: Sequence[str | int], value: object) -> Any:
    """A body with a value at a path."""
    if not path:
        return value
    if isinstance(path[0], int):
        return [placed(None, path[1:], value)]
    inner = body if isinstance(body, dict) else {}
    return {**inner, path[0]: placed(inner.get(path[0]), path[1:], value)}


def boundary_cases() -> Iterator[Case]:
    seen = set()
    for route, row in ROUTES.items():
        for model in row.bodies:
            if model in seen:
                continue
            seen.add(model)
            schema = model.model_json_schema()
            for place in dict.fromkeys(places(schema, schema.get("$defs", {}))):
                text = json.dumps(placed(ROOTS.get(model.__name__, {}), place, "@"))
                yield from ((route.split()[1], text.replace('"@"', number).encode()) for number in NUMBERS)


def test_numbers_at_every_boundary(target: Attacked) -> None:
    """CVE-2026-21869, CVE-2026-43632, CVE-2026-118375 (memory unsafety): every number is checked before it is used."""
    cases = list(boundary_cases())
    assert len(cases) > 1500
    for name in ("n", "best_of", "seed", "max_new_tokens", "top_n_tokens", "tokens", "temperature", "top_logprobs"):
        assert any(b'"%s": -1' % name.encode() in body or b'"%s": [-1]' % name.encode() in body for _, body in cases)
    replies = attack(target, cases)
    assert 0.02 < share(replies, 200) < 0.5


TEXTS = ["", "\x00", "a\x00b", "\ufffe\uffff", "<|eot_id|>" * 9, "<0x00>", "\u202e", "a\u0301" * 99, "\U0010ffff", "\r"]
IDS: list[object] = [[], [-1], [4095], [4096], [2**31 - 1], [2**31], [2**63], [2**64], [10**40], [1.0], [True], [[]]]
IDS += [[None], ["1"], [0] * 63, [0] * 64, [0] * 5000, [4095] * 9, {"0": 1}, 7, [[1], 1], [[1], "a"], [[1]] * 9]


def test_engine_asserts_from_input(server: Running) -> None:
    """PYSEC-2026-2303, CVE-2026-105754: no prompt, id or text ends the engine's thread."""
    bodies: list[tuple[str, dict[str, Any]]] = [("/v1/completions", {**COMPLETION, "prompt_embeds": "gAN9cQAu"})]
    for ids in IDS:
        bodies += [("/v1/completions", {**COMPLETION, name: ids}) for name in ("prompt", "stop_token_ids")]
        bodies += [("/v1/completions", {**COMPLETION, "allowed_token_ids": ids}), ("/detokenize", {"tokens": ids})]
    for text in TEXTS:
        bodies += [("/v1/completions", {**COMPLETION, name: text}) for name in ("prompt", "stop", "suffix", "model")]
        bodies += [("/generate", {**GENERATE, "inputs": text}), ("/tokenize", {"inputs": text})]
        bodies += [("/v1/completions", {**COMPLETION, "bad_words": [text]})]
        bodies += [("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": text}]})]
    bodies += [("/v1/completions", {**COMPLETION, "logit_bias": {key: 1}}) for key in ("-1", "4096", "9" * 9, "٣", "")]
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": r'{"a":"\ud800"}'}}
    half = {**CHAT, "messages": [{"role": "assistant", "content": "x", "tool_calls": [call]}, *MESSAGES]}
    with Wire(server.url) as wire:
        for path, body in bodies:
            reply = wire.post(path, json.dumps(body).encode())
            assert reply.status == 200 or reply.refused, (path, body)
            assert server.served.engine.alive, (path, body)
        assert wire.post("/v1/completions", rb'{"prompt":"\ud800","max_tokens":1}').status == 400
        assert wire.post("/v1/chat/completions", json.dumps(half).encode()).status in (200, 400)
    assert server.idle()
