"""What clients send beside a request: bookkeeping, values that ask for nothing, histories as they replay them; and
which fields are refused since ignoring them would change the answer.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from running import MESSAGES, Running, running

from squawq.serve import fields as body_fields

CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0}
COMPLETION: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 6, "temperature": 0}
TAKEN: list[dict[str, Any]] = [
    {"max_retries": 2, "timeout": 600, "extra_headers": {"a": "b"}, "provider": {"order": []}},
    {"top_logprobs": 0, "logprobs": False, "modalities": ["text"], "audio": {"voice": "x", "format": "wav"}},
    {"include_reasoning": True, "verbosity": "low", "reasoning_effort": "high", "prediction": {"type": "content"}},
    {"prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": "30m"}, "metadata": {"a": [1]}},
    {"documents": [], "mm_processor_kwargs": {}, "tools": [], "extra_body": {}, "functions": [], "options": {}},
    {"thinking": {"type": "disabled"}, "enable_thinking": False, "function_call": "none", "best_of": 1},
    {"keep_alive": "5m", "cache_prompt": True, "mirostat": 0, "chat_template": "", "repeat_penalty": 1.0},
    {"a_field_that_nobody_knows": {"x": [1, 2]}},
    {"stream_options": None, "tool_choice": "auto", "parallel_tool_calls": False, "response_format": {"type": "text"}},
]


@pytest.fixture(params=["server", "tgi_server"])
def any_server(request: pytest.FixtureRequest) -> Running:
    found: Running = request.getfixturevalue(request.param)
    return found


def content(server: Running, **fields: Any) -> Any:
    answer = server.post("/v1/chat/completions", {**CHAT, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def prompt(server: Running, **fields: Any) -> str:
    answer = server.post("/chat_tokenize", {**CHAT, **fields})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["templated_text"])


def test_what_asks_for_nothing_is_taken(any_server: Running) -> None:
    plain = content(any_server)
    assert [fields for fields in TAKEN if content(any_server, **fields) != plain] == []
    texts = set()
    for fields in ({}, {"max_retries": 1, "documents": [], "x": 1}):
        texts.add(any_server.post("/v1/completions", {**COMPLETION, **fields}).json()["choices"][0]["text"])
    assert len(texts) == 1


def test_what_has_a_meaning_is_refused(server: Running) -> None:
    for name in body_fields.REFUSED:
        answer = server.post("/v1/chat/completions", {**CHAT, name: {"any": "value"}})
        if name == "audio":  # alone it asks for nothing
            continue
        assert answer.status_code == 400, name
        assert answer.json()["error"]["param"] == name
        assert f"{name}: not supported: {body_fields.REFUSED[name]}" in answer.json()["error"]["message"]
    heard = [{"role": "assistant", "content": None, "audio": {"id": "x"}}, *MESSAGES]
    assert "text only" in server.post("/v1/chat/completions", {**CHAT, "messages": heard}).json()["error"]["message"]
    answer = server.post("/v1/chat/completions", {**CHAT, "modalities": ["text", "audio"]})
    assert answer.json()["error"]["param"] == "modalities"


def test_unknown_fields_are_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_fields, "_logged", set())
    with caplog.at_level(logging.WARNING, logger="squawq.serve"):
        for _ in range(3):
            assert body_fields.known({"a": 1, "new": 2, "timeout": 3}, {"a": 1}) == {"a": 1}
        for number in range(1000):
            body_fields.known({f"x{number}": 1}, ())
    assert len(caplog.records) == body_fields.MAX_LOGGED
    assert [getattr(record, "fields", None) for record in caplog.records[:2]] == [{"field": "new"}, {"field": "x0"}]


def test_strict_fields() -> None:
    with running(strict_fields=True) as server:
        assert server.post("/v1/chat/completions", CHAT).status_code == 200
        for fields, where in (
            ({"max_retries": 2}, "max_retries"),
            ({"documents": []}, "documents"),
            ({"x": 1}, "x"),
            ({"messages": [{**MESSAGES[0], "annotations": []}]}, "messages.0.annotations"),
        ):
            answer = server.post("/v1/chat/completions", {**CHAT, **fields})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, where)
        assert server.post("/generate", {"inputs": "a", "parameters": {"x": 1}}).status_code == 422


REPLAYED: list[dict[str, Any]] = [
    {"annotations": [], "refusal": None, "audio": None, "function_call": None, "tool_calls": None},
    {"annotations": [{"type": "url_citation"}], "provider_specific_fields": {"x": 1}, "id": "msg_1", "type": "message"},
    {"reasoning_content": "Hm.", "reasoning": "Hm.", "thinking_blocks": [{"type": "thinking"}], "parsed": {"a": 1}},
    {"reasoning": {"effort": "low"}, "cache_control": {"type": "ephemeral"}, "tool_calls": [], "audio": {}},
    {"content": [{"type": "output_text", "text": "Hi!", "annotations": []}]},
    {"content": None, "refusal": "Hi!"},
]


def test_histories_as_clients_replay_them(any_server: Running) -> None:
    said = {"role": "assistant", "content": "Hi!"}
    plain = prompt(any_server, messages=[*MESSAGES, said, *MESSAGES])
    for more in REPLAYED:
        assert prompt(any_server, messages=[*MESSAGES, {**said, **more}, *MESSAGES]) == plain, more


def test_calls_as_clients_replay_them(any_server: Running) -> None:
    call = {"id": "0", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    texts = set()
    for said, heard in (
        ({"tool_calls": [call]}, {"role": "tool", "tool_call_id": "0"}),
        ({"content": None, "tool_calls": [{**call, "index": 0}]}, {"role": "tool", "name": "f"}),
        (
            {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]},
            {"role": "function", "name": "f"},
        ),
        ({"tool_calls": [{**call, "function": {"name": "f", "arguments": {}, "description": None}}]}, {"role": "tool"}),
        ({"content": None, "function_call": {"name": "f", "arguments": ""}}, {"role": "function", "name": "f"}),
    ):
        replayed = [*MESSAGES, {"role": "assistant", **said}, {"content": "21", **heard}]
        texts.add(prompt(any_server, messages=replayed))
    (text,) = texts
    assert '{"name": "f", "parameters": {}}' in text


def test_what_the_template_reads(tmp_path: Any) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{{ [reasoning_effort | default('-'), enable_thinking | default('-'), thinking | default('-')] | join(' ') }}:"
        "{% for message in messages %}{{ message.reasoning_content }}|{{ message.content }}{% endfor %}"
    )
    with running(chat_template=template) as server:

        def read(**fields: Any) -> str:
            return prompt(server, **fields).partition(":")[0]

        assert read() == "- - -"
        assert read(reasoning_effort="high") == "high - -"
        assert read(reasoning_effort="none") == "none False -"
        assert read(thinking={"type": "disabled"}) == "- False False"
        assert read(enable_thinking=True) == "- True -"
        assert read(enable_thinking=True, chat_template_kwargs={"enable_thinking": False}) == "- False -"
        for name in ("reasoning_content", "reasoning"):
            said = {"role": "assistant", "content": "Hi!", name: "Greet."}
            assert prompt(server, messages=[said], add_generation_prompt=False).endswith("Greet.|Hi!")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"guided_json": {"enum": ["a", "b"]}}, {"json": {"enum": ["a", "b"]}}),
        ({"guided_regex": "[ab]{2}"}, {"regex": "[ab]{2}"}),
        ({"guided_choice": ["yes", "no"]}, {"choice": ["yes", "no"]}),
        ({"guided_grammar": 'root ::= "a" ("b" | "c")'}, {"grammar": 'start: "a" ("b" | "c")'}),
    ],
)
def test_older_names_of_structured_outputs(any_server: Running, old: dict[str, Any], new: dict[str, Any]) -> None:
    assert content(any_server, **old) == content(any_server, structured_outputs=new)


def test_closed_objects(any_server: Running) -> None:
    schema = {"properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    forms: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"response_format": {"type": "json_object", "value": schema}},
        {"guided_json": schema},
        {"structured_outputs": {"json": schema, "disable_additional_properties": True}},
    ]
    for form in forms:
        assert set(json.loads(content(any_server, **form, max_tokens=300))) == {"a"}
    parameters = {"grammar": {"type": "json", "value": schema}, "max_new_tokens": 300}
    text = any_server.post("/generate", {"inputs": "Say", "parameters": parameters}).json()["generated_text"]
    assert set(json.loads(text)) == {"a"}


TAGS = [
    ("<f=a>", {"properties": {"x": {"type": "boolean"}}, "required": ["x"]}, "</f>"),
    ("<f=b>", {"type": "null"}, ""),
]


def test_structural_tags(server: Running) -> None:
    old = {"structures": [{"begin": b, "schema": s, "end": e} for b, s, e in TAGS], "triggers": ["<f="]}
    tags = [{"begin": b, "content": {"type": "json_schema", "json_schema": s}, "end": e} for b, s, e in TAGS]
    new = {"type": "triggered_tags", "triggers": ["<f="], "tags": tags}
    many: dict[str, Any] = {"allOf": [{"properties": {f"a{number}": {}}} for number in range(500)]}
    free = content(server)
    for form in (old, {"format": new}):
        assert content(server, response_format={"type": "structural_tag", **form}) == free
        assert content(server, structured_outputs={"structural_tag": json.dumps(form)}) == free
    for wrong, why in (
        ({"structures": [], "triggers": ["<"]}, "has 1 to 128 tags"),
        ({**old, "triggers": ["x"]}, "has no trigger"),
        ({**old, "triggers": []}, "triggers must be a list"),
        ({"structures": [{"begin": "<f="}], "triggers": ["<f="]}, "a tag must have begin"),
        ({"format": {"type": "sequence"}}, "of the type triggered_tags"),
        ({"structures": [{"begin": "<f=", "schema": many}], "triggers": ["<f="]}, "the schema is refused"),
    ):
        answer = server.post("/v1/chat/completions", {**CHAT, "response_format": {"type": "structural_tag", **wrong}})
        assert (answer.status_code, why in answer.text) == (400, True), answer.text


def deltas(server: Running, **fields: Any) -> list[dict[str, Any]]:
    answer = server.post("/v1/chat/completions", {**CHAT, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line)["choices"][0] for line in lines]
    assert [bool(chunk["finish_reason"]) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    return [chunk["delta"] for chunk in chunks]


def test_tgis_deltas_can_be_added(tgi_server: Running) -> None:
    """Its clients add up role and content of every chunk, or the arguments of a call."""
    for fields in ({}, {"logit_bias": {"4": 100}}, {"max_tokens": 1}, {"stop": [" upon"]}):
        found = deltas(tgi_server, **fields)
        assert {delta["role"] for delta in found} == {"assistant"}
        whole = tgi_server.post("/v1/chat/completions", {**CHAT, **fields}).json()["choices"][0]["message"]
        assert "".join(delta["content"] for delta in found) == whole["content"]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"enum": [1]}}}}}
    for most in (300, 60):
        found = deltas(tgi_server, tools=[tool], tool_choice="f", max_tokens=most)
        (names, arguments) = "", ""
        for delta in found:
            assert set(delta) == {"role", "tool_calls"}
            (call,) = delta["tool_calls"]
            names += call["function"].get("name") or ""
            arguments += call["function"]["arguments"]
        assert names == "f"
    assert arguments.startswith("{")
