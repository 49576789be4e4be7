"""Two API keys on one server: neither waits for what the other has queued, and neither finds the other's prompts in the
prefix cache, whose speed would tell of them (CVE-2025-46570). How turns are taken is tests/engine/test_scheduler.py's.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from running import MESSAGES, Running, running
from test_operations import address, request, until

from squawq.serve.openai.completions import CompletionCall

KEYS = {name: {"authorization": f"Bearer key-of-{name}"} for name in "ab"}
PROMPT = "One day, a cat and a dog went to the park. They saw a big red ball and ran to it. "
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT * 2, "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT * 2}], "max_tokens": 1},
}


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    with running(api_keys=("key-of-a", "key-of-b"), max_num_seqs=8) as server:
        yield server


def hits(server: Running, path: str, body: dict[str, Any], **options: Any) -> int:
    """Tokens of the prompt that the cache had."""
    before = server.served.engine.stats().prefix_hits
    assert server.post(path, body, **options).status_code == 200
    return server.served.engine.stats().prefix_hits - before


@pytest.mark.parametrize("path", BODIES)
def test_a_key_finds_its_own_prompts_alone(shared: Running, path: str) -> None:
    found = [hits(shared, path, BODIES[path], headers=KEYS[name]) for name in "abab"]
    assert found[:2] == [0, 0]
    assert min(found[2:]) > 0


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("keys", [(), ("key-of-a", "key-of-b")], ids=["no keys", "keys"])
def test_salts_part_the_cache(server: Running, shared: Running, keys: tuple[str, ...], path: str) -> None:
    one = shared if keys else server
    found = []
    for salt in (None, "x", "y", "x", None):
        body = {**BODIES[path], **({} if salt is None else {"cache_salt": f"salt {salt}"})}
        found.append(hits(one, path, body, headers=KEYS["a"]))
    assert found[1:3] == [0, 0]
    assert min(found[3:]) > 0


def test_without_keys_all_share_the_cache(server: Running) -> None:
    body = {**BODIES["/v1/completions"], "prompt": "Tom and Sue. " + 2 * PROMPT}
    assert hits(server, "/v1/completions", body, headers=KEYS["a"]) == 0
    assert hits(server, "/v1/completions", body, headers=KEYS["b"]) > 0


@pytest.mark.parametrize("salt", ["", 1, ["x"], "x" * 1001])
def test_a_salt_is_text(server: Running, salt: Any) -> None:
    for path, body in BODIES.items():
        reply = server.post(path, {**body, "cache_salt": salt})
        assert reply.status_code == 400
        assert "cache_salt" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2}),
        ("/generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 2}}),
    ],
)
def test_a_large_request_does_not_hold_up_another_key(shared: Running, path: str, body: dict[str, Any]) -> None:
    engine, many = shared.served.engine, 200
    large = {"prompt": ["Once upon a time"] * many, "max_tokens": 150, "ignore_eos": True, "stream": True}
    client = httpx.Client(base_url=shared.url, headers=KEYS["a"], timeout=60)
    with client, client.stream("POST", "/v1/completions", json=large) as answer:
        next(lines := answer.iter_lines())  # held: a stream that nothing reads is closed
        assert until(lambda: engine.stats().waiting >= many - 2 * 8)
        before = engine.stats()
        assert before.running == 8
        assert shared.post(path, body, headers=KEYS["b"]).status_code == 200
        after = engine.stats()
        assert after.preemptions > before.preemptions
        assert after.waiting >= many - 4 * 8, "the small request waited for sequences of the large one"
        del lines
    assert shared.idle()


def test_checking_takes_turns_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one key has queued to be checked holds up another key by one request at most."""
    with running(api_keys=("key-of-a", "key-of-b"), validation_workers=1) as server, contextlib.ExitStack() as stack:
        runtime, encode = server.server.api.runtime, server.served.tokenizer.encode
        texts: list[str] = []
        go_on = threading.Event()

        def slow(text: str, special: bool = True) -> list[int]:
            texts.append(text)
            go_on.wait(20)
            return encode(text, special)

        monkeypatch.setattr(server.served.tokenizer, "encode", slow)
        for count, name in enumerate("aaaaab", 1):
            connection = stack.enter_context(socket.create_connection(address(server), timeout=30))
            body = {"prompt": f"{name} {count}", "max_tokens": 1}
            connection.sendall(request("/v1/completions", body, f"Authorization: {KEYS[name]['authorization']}"))
            assert until(lambda count=count: runtime.unchecked == count)
        assert until(lambda: texts == ["a 1"])
        assert 'vllm:num_requests_waiting{model_name="demo_model"} 6.0' in (
            server.get("/metrics", headers=KEYS["a"]).text
        )
        go_on.set()
        assert until(lambda: len(texts) == 6)
        assert texts.index("b 6") <= 2
        assert server.idle()


def test_replies_are_made_in_turn_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one key's large replies, seconds of work each, hold up another key's by one piece of work."""
    with running(api_keys=("key-of-a", "key-of-b")) as server, contextlib.ExitStack() as stack:
        runtime, reply = server.server.api.runtime, CompletionCall.reply
        made: list[int] = []
        go_on = threading.Event()

        def slow(self: CompletionCall, *arguments: Any) -> Any:
            made.append(self.requests[0].prompt[0])
            go_on.wait(20)
            return reply(self, *arguments)

        monkeypatch.setattr(CompletionCall, "reply", slow)
        for number, name in enumerate("aaaaaab"):
            connection = stack.enter_context(socket.create_connection(address(server), timeout=30))
            body = {"prompt": [100 + number], "max_tokens": 1}
            connection.sendall(request("/v1/completions", body, f"Authorization: {KEYS[name]['authorization']}"))
            waiting = max(0, number - 1)
            assert until(lambda n=waiting: sum(map(len, runtime._replies._queues.values())) == n)
            assert until(lambda n=number - waiting + 1: len(made) == n)
        go_on.set()
        assert until(lambda: len(made) == 7)
        assert made.index(106) <= 3
        assert server.idle()


def test_health_and_another_key_are_answered_beside_a_full_queue() -> None:
    """As many connections as can be asked for suffice, and readiness is told while any key is let in."""
    keys = ("key-of-a", "key-of-b")
    long = {"prompt": "Once", "max_tokens": 3000, "ignore_eos": True}
    with (
        running(api_keys=keys, max_num_seqs=2, max_queued=2, max_connections=7) as server,
        contextlib.ExitStack() as stack,
    ):
        runtime = server.server.api.runtime
        for count, name in enumerate("aaaabb", 1):
            assert server.get("/readyz").status_code == 200
            connection = stack.enter_context(socket.create_connection(address(server), timeout=30))
            connection.sendall(request("/v1/completions", long, f"Authorization: {KEYS[name]['authorization']}"))
            assert until(lambda count=count: runtime.in_flight == count)
        assert server.get("/health").status_code == 200
        assert server.get("/readyz").status_code == 503
        stack.close()
        assert server.idle()


def test_a_key_that_fills_the_queue_leaves_room_for_another() -> None:
    """Each of two keys is let in up to half of what all may have under way, whatever the other holds."""
    keys = ("key-of-a", "key-of-b")
    long = {"prompt": "Once", "max_tokens": 3000, "ignore_eos": True}
    with running(api_keys=keys, max_num_seqs=2, max_queued=2) as server, contextlib.ExitStack() as stack:
        runtime = server.server.api.runtime

        def begin(name: str, count: int) -> bool:
            connection = stack.enter_context(socket.create_connection(address(server), timeout=30))
            connection.sendall(request("/v1/completions", long, f"Authorization: {KEYS[name]['authorization']}"))
            return until(lambda: runtime.in_flight == count)

        assert all(begin("a", count) for count in range(1, 5))
        small = {"prompt": "Once", "max_tokens": 1}
        assert server.post("/v1/completions", small, headers=KEYS["a"]).status_code == 503
        assert server.post("/v1/completions", small, headers=KEYS["b"]).status_code == 200
        assert all(begin("b", count) for count in (5, 6))
        assert server.post("/v1/completions", small, headers=KEYS["b"]).status_code == 503
        stack.close()
        assert server.idle()
