"""What a request costs beside its size: memory a byte of its body, and whether others are answered meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import pytest
from running import MESSAGES, Running
from wire import CHAT, COMPLETION, MEGABYTE, Attacked, Wire, attacked

from squawq.engine.request import Request, SamplingParams
from squawq.serve.app import ROUTES
from squawq.serve.limits import cost
from squawq.serve.settings import ServerSettings


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with attacked(tmp_path_factory.mktemp("home")) as found:
        yield found


IDS = [5, 6, 7, 8] * 500
SCORED = {"max_tokens": 1, "prompt_logprobs": 20, "logprobs": 20, "echo": True}
TOO_MANY: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {**SCORED, "prompt": [IDS] * 16}),
    ("/v1/completions", {**SCORED, "prompt": [IDS] * 16, "stream": True}),
    ("/v1/completions", {"prompt": IDS, "echo": True, "logprobs": 20, "n": 32, "max_tokens": 0}),
    ("/v1/completions", {"prompt": [[5]] * 64, "logprobs": 20, "max_tokens": 1000}),
    ("/v1/completions", {"prompt": "a", "logprobs": 20, "best_of": 64, "max_tokens": 1000}),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 20, "n": 64, "max_tokens": 1000}),
    ("/invocations", {**CHAT, "logprobs": True, "top_logprobs": 20, "n": 64, "max_tokens": 1000}),
]


@pytest.mark.parametrize(("path", "body"), TOO_MANY, ids=range(len(TOO_MANY)))
def test_log_probabilities_are_bounded(server: Running, path: str, body: dict[str, Any]) -> None:
    before = server.served.engine.stats().prompt_tokens_computed
    reply = server.post(path, body)
    assert reply.status_code == 400
    most = server.served.settings.max_logprob_entries
    assert f"at most {most} are listed" in reply.json()["error"]["message"]
    assert server.served.engine.stats().prompt_tokens_computed == before, "work was done"


def test_tgi_log_probabilities_are_bounded(tgi_server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tgi_server.served.settings
    before = settings.max_logprob_entries
    parameters = {"details": True, "decoder_input_details": True, "top_n_tokens": 4, "max_new_tokens": 20}
    try:
        object.__setattr__(settings, "max_logprob_entries", 104)
        asked = {"inputs": "Once upon a time", "parameters": parameters}
        refused = tgi_server.post("/generate", asked)
        assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
        assert "at most 104 are listed" in refused.json()["error"]
        del parameters["max_new_tokens"]  # as much as there is room for
        details = tgi_server.post("/generate", asked).json()["details"]
        assert len(details["prefill"]) + 5 * details["generated_tokens"] <= 104
        assert details["finish_reason"] == "length"
    finally:
        object.__setattr__(settings, "max_logprob_entries", before)


def test_a_reply_that_did_not_say_how_long_ends_where_it_is_full(server: Running) -> None:
    settings = server.served.settings
    before = settings.max_logprob_entries
    try:
        object.__setattr__(settings, "max_logprob_entries", 1000)
        asked = {**CHAT, "logprobs": True, "top_logprobs": 9, "n": 5, "ignore_eos": True}
        del asked["max_tokens"]
        found = server.post("/v1/chat/completions", asked).json()
        assert [len(choice["logprobs"]["content"]) for choice in found["choices"]] == [20] * 5
        assert {choice["finish_reason"] for choice in found["choices"]} == {"length"}
        assert server.post("/v1/chat/completions", {**asked, "max_tokens": 21}).status_code == 400
    finally:
        object.__setattr__(settings, "max_logprob_entries", before)


def whole(url: str, path: str, body: object) -> bytes:
    """A reply of any size."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=120)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    found = response.read()
    connection.close()
    assert response.status == 200, found[:1000]
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_large_reply_holds_nobody_up(target: Attacked, stream: bool) -> None:
    """/health is answered while a reply with many log probabilities is made and sent, which is not held as objects."""
    assert target.lives()
    before = target.forget_peak()
    body = {**SCORED, "prompt": [IDS] * 3, "stream": stream}
    with ThreadPoolExecutor(1) as pool, Wire(target.url) as other:
        large = pool.submit(whole, target.url, "/v1/completions", body)
        waits = []
        while not large.done():
            health = other.ask("GET", "/health")
            assert health.status == 200
            waits.append(health.seconds)
    size = len(large.result())
    assert size > 8 * MEGABYTE
    assert max(waits) < sum(waits) / 4, "one answer took a good part of the whole"
    assert target.resident(peak=True) - before < 5 * size


MOST = 256  # bytes of memory for a byte of a body: a token takes the tokenizer hundreds while it encodes
MESSAGE = {"role": "user", "content": ""}
PART = {"type": "text", "text": ""}
LARGE: list[tuple[str, dict[str, Any]]] = [  # bodies of about a megabyte
    ("/v1/chat/completions", {**CHAT, "messages": [MESSAGE] * 25_000}),
    ("/v1/chat/completions", {**CHAT, "messages": [{**MESSAGE, "content": [PART] * 30_000}]}),
    ("/v1/chat/completions", {**CHAT, "metadata": {str(i): "" for i in range(80_000)}}),
    ("/chat_tokenize", {**CHAT, "messages": [MESSAGE] * 25_000}),
    ("/v1/completions", {**COMPLETION, "prompt": ["a"] * 200_000}),
    ("/v1/completions", {**COMPLETION, "prompt": [[1]] * 200_000}),
    ("/v1/completions", {**COMPLETION, "prompt": [7] * 300_000}),
    ("/v1/completions", {**COMPLETION, "prompt": "a b " * 250_000}),
    ("/v1/completions", {**COMPLETION, "prompt": ["a b " * 1000] * 250}),
    ("/v1/completions", {**COMPLETION, "prompt": "a", "allowed_token_ids": [7] * 250_000}),
    ("/tokenize", {"prompt": "a b " * 250_000}),
    ("/tokenize", {"inputs": "a b " * 30_000}),
    ("/tokenize", {"messages": [MESSAGE] * 25_000}),
    ("/detokenize", {"tokens": [7] * 300_000}),
    ("/generate", {"inputs": "a b " * 250_000, "parameters": {"max_new_tokens": 1}}),
    ("/generate_stream", {"inputs": "a b " * 250_000, "parameters": {"max_new_tokens": 1}}),
    ("/", {"inputs": "a b " * 250_000, "parameters": {"truncate": 5, "max_new_tokens": 1}}),
    ("/v1", {"inputs": "a", "parameters": {"stop": ["b"] * 200_000}}),
    ("/invocations", {**CHAT, "messages": MESSAGES * 15_000}),
    ("/v1/embeddings", {"input": ["a"] * 200_000}),
    ("/ping", {"a": "b" * 1_000_000}),
]


def test_memory_is_bounded_by_the_body_on_every_route(target: Attacked) -> None:
    assert {row.split()[1] for row in ROUTES if row.startswith("POST")} <= {path for path, _ in LARGE}
    assert target.lives()
    for path, body in LARGE:
        raw = json.dumps(body).encode()
        before = target.forget_peak()
        target.wire.post(path, raw)
        grown = target.resident(peak=True) - before
        assert grown < MOST * len(raw), (path, str(body)[:100], len(raw), grown)
    assert target.lives()


def test_log_probabilities_take_no_more_memory_than_they_count_for(target: Attacked) -> None:
    """As many as a reply may list, from a body of some kilobytes."""
    assert target.lives()
    most = ServerSettings.max_logprob_entries
    prompts = [IDS] * (most // 21 // len(IDS))
    params = SamplingParams(max_tokens=1, prompt_logprobs=20)
    counted = cost(Request("r", ids, params) for ids in prompts)
    before = target.forget_peak()
    size = len(whole(target.url, "/v1/completions", {"prompt": prompts, "max_tokens": 1, "prompt_logprobs": 20}))
    grown = target.resident(peak=True) - before
    assert size > most * 20, "many were listed"
    assert grown < 1.2 * counted, (size, grown, counted)


def test_small_requests_never_wait_for_large_ones(target: Attacked) -> None:
    """Six large chats, which truncation lets in, take their time; small ones overtake them."""
    text = {"role": "user", "content": "a b " * 60_000}
    large_body = json.dumps({**CHAT, "messages": [text], "truncate_prompt_tokens": 5}).encode()
    small_body = json.dumps(CHAT).encode()

    def ask(body: bytes) -> int:
        with Wire(target.url) as wire:
            return wire.post("/v1/chat/completions", body).status

    with ThreadPoolExecutor(6) as pool:
        large = [pool.submit(ask, large_body) for _ in range(6)]
        while not any(one.done() for one in large):
            assert ask(small_body) == 200
        assert sum(one.done() for one in large) < 4, "small ones waited for large ones"
        assert [one.result() for one in large] == [200] * 6


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/invocations", "/tokenize", "/chat_tokenize"])
def test_more_messages_than_the_context_has_tokens(target: Attacked, path: str) -> None:
    reply = target.post(path, {**CHAT, "messages": [MESSAGE] * 55_000})
    assert reply.status in (400, 422)
    assert b"this one has 55000 messages" in reply.body
