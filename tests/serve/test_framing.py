"""The frames of streams and the headers of replies in either dialect, byte by byte where clients depend on them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from running import Running
from test_dialects import CHAT, COMPLETION, PROMPT, ask, choice_of, is_tgi

PARAMETERS = {"max_new_tokens": 8, "details": True}
HEADERS = {"x-compute-type", "x-compute-time", "x-compute-characters", "x-total-time", "x-validation-time"}
HEADERS |= {"x-inference-time", "x-time-per-token", "x-prompt-tokens", "x-generated-tokens"}


@pytest.fixture(params=["server", "tgi_server"])
def any_server(request: pytest.FixtureRequest) -> Running:
    found: Running = request.getfixturevalue(request.param)
    return found


def events(server: Running, path: str, body: dict[str, Any]) -> list[Any]:
    """The payloads of a stream, whose frame is checked."""
    answer = server.post(path, body)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (answer.headers["x-accel-buffering"], answer.headers["cache-control"]) == ("no", "no-cache")
    *lines, last = answer.text.split("\n\n")
    assert last == ""
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


@pytest.mark.parametrize("usage", [False, True])
def test_streams_of_the_shared_routes(any_server: Running, usage: bool) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        options = {"stream": True, "model": "other", **({"stream_options": {"include_usage": True}} if usage else {})}
        *chunks, last = events(any_server, path, {**body, **options})
        assert last == "[DONE]"
        if usage:
            total = chunks.pop()
            assert (total["choices"], total["usage"]["completion_tokens"]) == ([], 8)
        told = [chunk.get("usage", {}).get("completion_tokens") for chunk in chunks]
        completed = is_tgi(any_server) and "prompt" in body  # whose last chunk has it in TGI
        assert told == [None] * (len(chunks) - 1) + [8 if completed else None]
        assert {chunk["model"] for chunk in chunks} == {"other" if is_tgi(any_server) else "demo_model"}
        going = "" if completed else None
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [going] * (len(chunks) - 1) + ["length"]
        if "messages" in body:
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
            text = "".join(delta.get("content", "") for delta in deltas)
            assert text == choice_of(any_server, body)["message"]["content"]
            roles = [delta["role"] for delta in deltas if delta.get("role")]
            assert (deltas[0]["role"], len(roles)) == ("assistant", 8 if is_tgi(any_server) else 1)
            assert deltas[-1] == (
                {"role": "assistant", "content": text[-len(deltas[-1]["content"]) :]} if is_tgi(any_server) else {}
            )
        else:
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice_of(any_server, body)["text"]


def test_usage_in_every_chunk(any_server: Running) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        *chunks, _ = events(any_server, path, {**body, **options})
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert (sorted(counts), counts[-1]) == (counts, 8)


def test_usage_without_a_stream(any_server: Running) -> None:
    answer = any_server.post("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}})
    assert answer.status_code == (200 if is_tgi(any_server) else 400)


def test_tgis_streams_have_no_end_mark(any_server: Running) -> None:
    whole = ask(any_server, "/generate", {"inputs": PROMPT, "parameters": PARAMETERS})
    for path, more in (("/generate_stream", {}), ("/", {"stream": True}), ("/v1", {"stream": True})):
        found = events(any_server, path, {"inputs": PROMPT, "parameters": PARAMETERS, **more})
        assert [event["index"] for event in found] == list(range(1, 9))
        assert [event["token"] for event in found] == whole["details"]["tokens"]
        assert [event["generated_text"] for event in found[:-1]] == [None] * 7
        assert found[-1]["generated_text"] == ("" if path == "/generate_stream" else PROMPT) + whole["generated_text"]
        assert found[-1]["details"] == {
            "finish_reason": "length",
            "generated_tokens": 8,
            "seed": None,
            "input_length": 5,
        }


def test_whole_replies_of_tgis_routes(any_server: Running) -> None:
    asked = {"inputs": PROMPT, "parameters": {"max_new_tokens": 8}}
    one = ask(any_server, "/generate", asked)
    assert set(one) == {"generated_text"}
    for path in ("/", "/v1", "/invocations"):
        assert ask(any_server, path, asked) == [{"generated_text": PROMPT + one["generated_text"]}]


def test_headers(any_server: Running) -> None:
    for path in ("/generate", "/"):
        headers = any_server.post(path, {"inputs": PROMPT, "parameters": PARAMETERS}).headers
        assert set(headers) >= HEADERS
        counts = [headers[f"x-{name}"] for name in ("prompt-tokens", "generated-tokens", "compute-characters")]
        assert counts == ["5", "8", str(len(PROMPT))]
        assert headers["x-compute-type"] == "cpu"
        parts = int(headers["x-validation-time"]) + int(headers["x-inference-time"])
        assert abs(parts - int(headers["x-total-time"])) <= 1  # each is rounded to milliseconds
        assert abs(1000 * float(headers["x-compute-time"]) - int(headers["x-total-time"])) <= 1
    assert not HEADERS & set(any_server.post("/v1/completions", COMPLETION).headers)


def test_the_id_of_a_request(any_server: Running) -> None:
    assert any_server.get("/version", headers={"x-request-id": "mine.1"}).headers["x-request-id"] == "mine.1"
    given = {any_server.get("/version", headers={"x-request-id": name}).headers["x-request-id"] for name in ("", "a b")}
    assert all(len(name) == 32 for name in given)
    assert len(given) == 2


def test_health_is_empty(any_server: Running) -> None:
    for path in ("/", "/health", "/ping", "/livez", "/readyz"):
        answer = any_server.get(path)
        assert (answer.status_code, answer.content) == (200, b"")
