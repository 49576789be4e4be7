"""Where TGI and vLLM contradict each other, and TGI's traps: which rule holds on which route of a server in either
dialect. The frames of streams and the headers of replies are test_framing.py's.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from running import MESSAGES, Running

from squawq.engine.request import Request, SamplingParams
from squawq.serve import launcher, tgi_launcher

PROMPT = "Once upon a time"
CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}
COMPLETION: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
TGI_PATHS = ("/", "/v1", "/generate", "/generate_stream")


@pytest.fixture(params=["server", "tgi_server"])
def any_server(request: pytest.FixtureRequest) -> Running:
    found: Running = request.getfixturevalue(request.param)
    return found


def is_tgi(server: Running) -> bool:
    return server.server.api.settings.tgi


def ask(server: Running, path: str, body: dict[str, Any]) -> Any:
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def choice_of(server: Running, body: dict[str, Any]) -> dict[str, Any]:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    found: dict[str, Any] = ask(server, path, body)["choices"][0]
    return found


def refused(answer: httpx.Response, status: int, kind: str, message: str, *, tgi_route: bool = False) -> None:
    """own: in TGI's form, of one of its routes or in its dialect."""
    body = answer.json()
    assert (answer.status_code, body["error_type"]) == (status, kind)
    if tgi_route:
        assert (set(body), message in body["error"]) == ({"error", "error_type"}, True), body
    else:
        assert (set(body), set(body["error"])) == ({"error", "error_type"}, {"message", "type", "param", "code"})
        assert (message in body["error"]["message"], body["error"]["code"]) == (True, status), body


def engine_text(server: Running, ids: list[int], **params: Any) -> str:
    request = Request("test", ids, SamplingParams(**params))
    return "".join(output.text for output in server.served.engine.generate([request]))


def chat_ids(server: Running) -> list[int]:
    return server.served.encode(server.served.render_chat(MESSAGES), special=False)


@pytest.mark.parametrize("stream", [False, True])
def test_validation(any_server: Running, stream: bool) -> None:
    """Before a stream has begun an error has its status, where TGI sends 200 and an event."""
    status = 422 if is_tgi(any_server) else 400
    bad = {"temperature": -1, "stream": stream}
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        refused(
            any_server.post(path, {**body, **bad}),
            status,
            "validation",
            "temperature: Input should be greater",
            tgi_route=is_tgi(any_server),
        )
    parameters = {"temperature": -1}
    for path in TGI_PATHS:
        body = {"inputs": PROMPT, "parameters": parameters, "stream": stream and path != "/generate"}
        answer = any_server.post(path, body)
        refused(
            answer, 422, "validation", "Input validation error: `temperature` must be strictly positive", tgi_route=True
        )


def test_bodies_that_are_no_requests(any_server: Running) -> None:
    status = 422 if is_tgi(any_server) else 400
    for path in ("/v1/chat/completions", "/generate"):
        own = path in TGI_PATHS
        for content in (b"{", b"[]", b"{}"):
            answer = httpx.post(any_server.url + path, content=content, headers={"content-type": "application/json"})
            assert answer.status_code == (422 if own else status)
            assert answer.json()["error_type"] == "validation"
        refused(
            httpx.post(any_server.url + path, content=b"{}"),
            415,
            "validation",
            "send JSON",
            tgi_route=own or is_tgi(any_server),
        )
        large = httpx.post(any_server.url + path, json={"inputs": "x" * 2_000_000}, timeout=60)
        refused(large, 413, "validation", "the body has more than 2000000 bytes", tgi_route=own or is_tgi(any_server))
        refused(
            any_server.get(path),
            405,
            "method_not_allowed",
            f"{path} does not take GET",
            tgi_route=own or is_tgi(any_server),
        )
    refused(
        any_server.post("/nothing", {}), 404, "not_found", "there is no route /nothing", tgi_route=is_tgi(any_server)
    )


def test_overload(any_server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    admission = any_server.server.api.runtime.admission
    for load in (admission.load, admission.tenants[""]):
        monkeypatch.setattr(load, "requests", any_server.server.api.settings.max_concurrent)
    answer = any_server.post("/v1/chat/completions", CHAT)
    refused(
        answer, 429 if is_tgi(any_server) else 503, "overloaded", "Model is overloaded", tgi_route=is_tgi(any_server)
    )
    assert answer.headers["retry-after"] == "1"
    for path in TGI_PATHS:
        answer = any_server.post(path, {"inputs": PROMPT})
        refused(answer, 429, "overloaded", "Model is overloaded", tgi_route=True)
    assert any_server.get("/health").status_code == 200


def test_unknown_models(any_server: Running) -> None:
    """Accepted in either dialect; TGI's says the name that was asked for, but the model's own for "tgi"."""
    for name in ("other", "tgi", None):
        body = {**CHAT, "model": name}
        shown = name if is_tgi(any_server) and name == "other" else "demo_model"
        assert ask(any_server, "/v1/chat/completions", body)["model"] == shown


def test_the_list_of_models(any_server: Running) -> None:
    (model,) = any_server.get("/v1/models").json()["data"]
    assert any_server.get("/v1/models/demo_model").json() == model
    found = (model["created"] == 0, model["owned_by"])
    assert found == ((True, "demo_model") if is_tgi(any_server) else (False, "squawq"))


def test_tokenize(any_server: Running) -> None:
    served = any_server.served
    ids = served.encode(PROMPT)
    found = ask(any_server, "/tokenize", {"prompt": PROMPT, "return_token_strs": True})
    assert (found["tokens"], found["count"], found["max_model_len"]) == (ids, len(ids), 4096)
    assert found["token_strs"] == ["<|begin_of_text|>", "Once", " upon", " a", " time"]
    assert ask(any_server, "/tokenize", {"messages": MESSAGES})["tokens"] == chat_ids(any_server)
    rows = ask(any_server, "/tokenize", {"inputs": PROMPT})
    assert [row["id"] for row in rows] == ids
    assert [PROMPT.encode()[row["start"] : row["stop"]].decode() for row in rows] == [row["text"] for row in rows]
    whole = ask(any_server, "/chat_tokenize", {"messages": MESSAGES})
    assert whole["templated_text"] == served.render_chat(MESSAGES)
    assert [row["id"] for row in whole["tokenize_response"]] == chat_ids(any_server)


def test_invocations(any_server: Running) -> None:
    parameters = {"max_new_tokens": 8}
    (text,) = ask(any_server, "/invocations", {"inputs": PROMPT, "parameters": parameters})
    assert text == ask(any_server, "/", {"inputs": PROMPT, "parameters": parameters})[0]
    for body in (CHAT, COMPLETION):
        found = ask(any_server, "/invocations", body)["choices"]
        assert found == [choice_of(any_server, body)]
    status = 422 if is_tgi(any_server) else 400
    refused(
        any_server.post("/invocations", {"text": PROMPT}),
        status,
        "validation",
        "one of: inputs (TGI), messages",
        tgi_route=is_tgi(any_server),
    )


def test_stop_strings(any_server: Running) -> None:
    for body in (CHAT, COMPLETION):
        found = choice_of(any_server, {**body, "max_tokens": 40, "stop": [" little"]})
        text = found["message"]["content"] if "message" in found else found["text"]
        kept = (text.endswith(" little"), found["finish_reason"])
        assert kept == ((True, "stop_sequence") if is_tgi(any_server) else (False, "stop"))
        assert found["stop_reason"] == " little"
    parameters = {"max_new_tokens": 40, "stop": [" little"], "details": True}
    found = ask(any_server, "/generate", {"inputs": PROMPT, "parameters": parameters})
    assert found["generated_text"].endswith(" little")
    assert found["details"]["finish_reason"] == "stop_sequence"
    ended = choice_of(any_server, {**CHAT, "logit_bias": {"4": 100}})
    assert (ended["message"]["content"], ended["finish_reason"]) == ("", "stop")


def test_how_many_stop_strings(any_server: Running) -> None:
    answer = any_server.post("/v1/completions", {**COMPLETION, "stop": list("vwxyz")})
    if is_tgi(any_server):
        refused(answer, 422, "validation", "`stop` supports up to 4 stop sequences. Given: 5", tgi_route=True)
    else:
        assert answer.status_code == 200


def test_the_temperature_where_none_is_given(any_server: Running) -> None:
    ids = chat_ids(any_server)
    found = choice_of(any_server, {"messages": MESSAGES, "max_tokens": 24, "seed": 3})["message"]["content"]
    tgi = engine_text(any_server, ids, max_tokens=24, seed=3, temperature=1.0)
    model = engine_text(any_server, ids, max_tokens=24, seed=3, temperature=0.6, top_p=0.9)
    assert tgi != model, "the seed shows no difference; choose another"
    assert found == (tgi if is_tgi(any_server) else model)


def test_generate_draws_where_there_are_no_parameters(any_server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(any_server.served, "max_len", 24)
    drawn = {ask(any_server, "/generate", {"inputs": PROMPT})["generated_text"] for _ in range(4)}
    greedy = {ask(any_server, "/generate", {"inputs": PROMPT, "parameters": {}})["generated_text"] for _ in range(2)}
    assert (len(drawn) > 1, len(greedy)) == (True, 1)


def test_max_tokens_where_none_are_given(any_server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(any_server.served, "max_len", 60)
    used = ask(any_server, "/v1/completions", {"prompt": PROMPT, "ignore_eos": True})["usage"]
    assert used["completion_tokens"] == (55 if is_tgi(any_server) else 16)
    used = ask(any_server, "/v1/chat/completions", {"messages": MESSAGES, "ignore_eos": True})["usage"]
    assert used["total_tokens"] == 60


def test_where_the_launchers_listen() -> None:
    served, launched = launcher.settings_from(["m"], {}), tgi_launcher.settings_from([], {"MODEL_ID": "m"})
    assert (served.dialect, served.port, served.host) == ("openai", 8000, "127.0.0.1")
    assert (launched.dialect, launched.port, launched.host) == ("tgi", 3000, "0.0.0.0")


def test_top_p_of_one(any_server: Running) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        answer = any_server.post(path, {**body, "top_p": 1.0})
        if is_tgi(any_server):
            refused(
                answer, 422, "validation", "Input validation error: `top_p` must be > 0.0 and < 1.0", tgi_route=True
            )
        else:
            assert answer.status_code == 200
    answer = any_server.post("/generate", {"inputs": PROMPT, "parameters": {"top_p": 1.0}})
    refused(answer, 422, "validation", "Input validation error: `top_p` must be > 0.0 and < 1.0", tgi_route=True)


def test_what_tgi_refuses_by_other_names(any_server: Running) -> None:
    tgi = is_tgi(any_server)
    answer = any_server.post("/v1/completions", {**COMPLETION, "suffix": "end"})
    refused(
        answer,
        422 if tgi else 400,
        "suffix not supported",
        "Suffix is not supported and can be achieved by",
        tgi_route=is_tgi(any_server),
    )
    answer = any_server.post("/v1/completions", {"prompt": ["a"] * (5 if tgi else 257)})
    most = f"Number of prompts exceeds the maximum allowed batch size of {4 if tgi else 256}"
    refused(answer, 422 if tgi else 400, "batch size exceeded", most, tgi_route=is_tgi(any_server))
    tools = [{"type": "function", "function": {"name": "f"}}]
    answer = any_server.post(
        "/v1/chat/completions", {**CHAT, "tools": tools, "response_format": {"type": "json_object"}}
    )
    if tgi:
        refused(answer, 422, "tool_error", "Tool error: Grammar and tools are mutually exclusive", tgi_route=True)
    else:
        assert answer.status_code == 200
    answer = any_server.post("/v1/chat/completions", {**CHAT, "tools": tools, "tool_choice": "g"})
    refused(
        answer, 422 if tgi else 400, "tool_error", "Tool error: tool_choice must be none, auto, required", tgi_route=tgi
    )


def test_both_keys_of_a_schema(any_server: Running) -> None:
    schema = {"enum": ["cat", "dog"]}
    outer = {"name": "pet", "schema": schema}
    forms: list[dict[str, Any]] = [
        {"type": "json_schema", "json_schema": outer},
        {"type": "json_schema", "value": outer},
        {"type": "json_object", "value": schema},
        {"type": "json", "value": json.dumps(schema)},
        {"type": "regex", "value": '"(cat|dog)"'},
    ]
    texts = {choice_of(any_server, {**CHAT, "response_format": form})["message"]["content"] for form in forms}
    assert len(texts) == 1
    assert texts < {'"cat"', '"dog"'}


def test_presence_penalty(any_server: Running) -> None:
    asked = {"max_tokens": 40, "temperature": 0, "presence_penalty": -0.7}
    found = choice_of(any_server, {"messages": MESSAGES, **asked})["message"]["content"]
    tgi = engine_text(any_server, chat_ids(any_server), max_tokens=40, repetition_penalty=1.3)
    openai = engine_text(any_server, chat_ids(any_server), max_tokens=40, presence_penalty=-0.7)
    assert tgi != openai
    assert found == (tgi if is_tgi(any_server) else openai)


def test_an_assistants_last_message(any_server: Running) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "Once upon a"}]
    text = choice_of(any_server, {**CHAT, "messages": begun, "max_tokens": 1})["message"]["content"]
    assert (text == " time") is is_tgi(any_server)
