"""A seed gives one text, and its log probabilities to the last bit: over runs, alone and among other requests, whole
and in a stream, with and without the prefix cache, however the prompt is cut into steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from running import MESSAGES, Running, running

PROMPT = "One day, a cat and a dog went to the park. They saw a big red ball and"
TOKENS = 24
SHARED: dict[str, Any] = {
    "seed": 20,
    "temperature": 1.2,
    "top_p": 0.95,
    "max_tokens": TOKENS,
    "n": 2,
    "ignore_eos": True,
}
TGI_PATHS: dict[str, Any] = {"seed": 20, "temperature": 1.2, "top_p": 0.95, "max_new_tokens": TOKENS, "details": True}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**SHARED, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2},
    "/v1/completions": {**SHARED, "prompt": PROMPT, "logprobs": 2, "echo": True},
    "/generate": {"inputs": PROMPT, "parameters": {**TGI_PATHS, "top_n_tokens": 2}},
}
Found = list[tuple[str, list[Any]]]  # of each sequence its text and the log probabilities of its tokens


@contextmanager
def others(server: Running, count: int) -> Iterator[None]:
    """So many other requests under way, of different lengths."""
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=server.url, timeout=60))
        streams = []  # one that nothing holds is closed
        for i in range(count):
            body = {"prompt": "Once upon a time " * (3 * i + 1), "seed": i, "max_tokens": 3000, "ignore_eos": True}
            answer = stack.enter_context(client.stream("POST", "/v1/completions", json={**body, "stream": True}))
            streams.append(answer.iter_lines())
            next(streams[-1])
        yield
        assert server.served.engine.stats().running >= count, "the others ended too early; the test shows nothing"
    assert server.idle()


def whole(server: Running, path: str) -> Found:
    """What a whole reply says."""
    body = server.post(path, BODIES[path]).json()
    if path == "/generate":
        details = body["details"]
        return [(body["generated_text"], [details["tokens"], details["top_tokens"]])]
    if path == "/v1/chat/completions":
        return [(choice["message"]["content"], choice["logprobs"]["content"]) for choice in body["choices"]]
    return [(choice["text"], list(zip(*choice["logprobs"].values(), strict=True))) for choice in body["choices"]]


def streamed(server: Running, path: str) -> Found:
    """The same from a stream."""
    route = "/generate_stream" if path == "/generate" else path
    text = server.post(route, BODIES[path] if route != path else {**BODIES[path], "stream": True}).text
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line and line != "data: [DONE]"]
    if path == "/generate":
        tokens = [event["token"] for event in events]
        return [(events[-1]["generated_text"], [tokens, [event["top_tokens"] for event in events]])]
    texts, scores = ["", ""], [[], []]  # type: tuple[list[str], list[list[Any]]]
    for choice in (event["choices"][0] for event in events):
        found, index = choice["logprobs"], choice["index"]
        texts[index] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        if found:
            scores[index] += found["content"] if "delta" in choice else zip(*found.values(), strict=True)
    return list(zip(texts, scores, strict=True))


@pytest.fixture(scope="module")
def first(server: Running) -> dict[str, Found]:
    """What the server says first; nothing of the prompts is cached then."""
    return {path: whole(server, path) for path in BODIES}


@pytest.mark.parametrize("path", BODIES)
def test_runs_are_alike(server: Running, first: dict[str, Found], path: str) -> None:
    assert all(len(text) > TOKENS for text, _ in first[path])
    assert len({text for text, _ in first[path]}) == len(first[path]), "the sequences of one request are the same"
    for _ in range(4):
        assert whole(server, path) == first[path]
        assert streamed(server, path) == first[path]


def test_others_make_no_difference(server: Running, first: dict[str, Found]) -> None:
    with others(server, 7):
        for _ in range(2):
            assert {path: whole(server, path) for path in BODIES} == first
            assert {path: streamed(server, path) for path in BODIES} == first


@pytest.mark.parametrize(
    "settings",
    [
        {"prefix_caching": False, "dialect": "tgi", "max_num_batched_tokens": 128},
        {"max_num_seqs": 4, "max_num_batched_tokens": 8, "threads": 2},
    ],
    ids=["no cache", "small steps"],
)
def test_how_it_is_computed_makes_no_difference(first: dict[str, Found], settings: dict[str, Any]) -> None:
    with running(**settings) as server:
        for path in BODIES:
            assert whole(server, path) == first[path]
            with others(server, 1):
                assert streamed(server, path) == first[path]
