"""The server, in both dialects, through huggingface_hub's InferenceClient: what TGI's users call it with."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import (
    BadRequestError,
    GenerationError,
    HfHubHTTPError,
    IncompleteGenerationError,
    OverloadedError,
    UnknownError,
    ValidationError,
)
from running import MESSAGES, Running, running
from test_openai_tools import ARGUMENTS, ENDS, TOOLS, tool_model

PROMPT = "Once upon a time"
LONG: dict[str, Any] = {"max_tokens": 4000, "stream": True, "extra_body": {"ignore_eos": True}}
SCHEMA = {
    "type": "object",
    "properties": {"tame": {"type": "boolean"}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["tame", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(params=["server", "tgi_server"])
def any_server(request: pytest.FixtureRequest) -> Running:
    found: Running = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["", "/v1"])
def base_url(any_server: Running, request: pytest.FixtureRequest) -> str:
    return any_server.url + str(request.param)


def client_of(url: str, **options: Any) -> Any:
    return InferenceClient(base_url=url, **options)


@pytest.fixture
def client(any_server: Running) -> Any:
    return client_of(any_server.url)


def engines(server: Running, tokens: int, **options: Any) -> str:
    """What the route of the same server says without the client."""
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": tokens, **options}}
    return str(server.post("/generate", body).json()["generated_text"])


def text_of(pieces: Iterable[str]) -> str:
    """A stream's text without the end token, which TGI shows in streams too."""
    return re.sub(r"<\|\w+\|>$", "", "".join(pieces))


def test_chats(base_url: str) -> None:
    client = client_of(base_url)
    asked = {"max_tokens": 8, "seed": 3, "temperature": 1.0}
    answer = client.chat_completion(MESSAGES, **asked)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 8)
    chunks = list(client.chat_completion(MESSAGES, stream=True, stream_options={"include_usage": True}, **asked))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert dict(chunks[-1].usage) == dict(answer.usage)
    same = client.chat.completions.create(MESSAGES, model="tgi", **asked)
    assert (same.choices[0].message.content, same.model) == (text, "demo_model")


def test_more_of_chats(client: Any) -> None:
    asked: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0}
    answer = client.chat_completion(MESSAGES, logprobs=True, top_logprobs=2, **asked)
    entries = answer.choices[0].logprobs.content
    assert [len(entry.top_logprobs) for entry in entries] == [2] * 8
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    assert len(client.chat_completion(MESSAGES, n=2, max_tokens=4).choices) == 2
    penalized = client.chat_completion(MESSAGES, frequency_penalty=1.0, presence_penalty=-0.5, top_p=0.9, **asked)
    assert penalized.usage.completion_tokens == 8


def test_forms_of_chats(client: Any) -> None:
    """The client sends json_schema as TGI's {"type": "json_object", "value": schema}."""
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
    asked = {"max_tokens": 400, "temperature": 0.0}
    text = client.chat_completion(MESSAGES, response_format=form, **asked).choices[0].message.content
    found = json.loads(text)
    assert (set(found), found["kind"] in ("cat", "dog")) == ({"tame", "kind"}, True)
    pieces = client.chat_completion(MESSAGES, response_format=form, stream=True, **asked)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    begun = client.chat_completion(MESSAGES, response_format={"type": "json_object"}, max_tokens=3).choices[0]
    assert begun.message.content.startswith("{")


@pytest.mark.parametrize("dialect", ["openai", "tgi"])
def test_tools(tmp_path: Path, dialect: str) -> None:
    with running(model=str(tool_model(tmp_path / "model", "llama3_json")), dialect=dialect) as server:
        client = client_of(server.url)
        asked = {"tools": TOOLS, "max_tokens": 200, "temperature": 0.0, "logit_bias": ENDS}
        for choice in ("required", {"type": "function", "function": {"name": "set_light"}}):
            answer = client.chat_completion(MESSAGES, tool_choice=choice, **asked).choices[0]
            (call,) = answer.message.tool_calls
            assert set(json.loads(call.function.arguments)) == ARGUMENTS[call.function.name]
            assert answer.finish_reason == "tool_calls"
            pieces = client.chat_completion(MESSAGES, tool_choice=choice, stream=True, **asked)
            calls = [c for piece in pieces for c in piece.choices[0].delta.tool_calls or ()]
            assert "".join(c.function.arguments for c in calls) == call.function.arguments
        held = {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": call.function}]}
        turns = [*MESSAGES, held, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
        assert client.chat_completion(turns, max_tokens=4).choices[0].message.content
        none = client.chat_completion(MESSAGES, tools=TOOLS, tool_choice="none", max_tokens=4).choices[0]
        assert none.message.tool_calls is None


def test_text(base_url: str, any_server: Running) -> None:
    client = client_of(base_url)
    text = engines(any_server, 8)
    assert client.text_generation(PROMPT, max_new_tokens=8) == PROMPT + text  # TGI's default for /
    assert client.text_generation(PROMPT, max_new_tokens=8, return_full_text=True) == PROMPT + text
    assert client.text_generation(PROMPT, max_new_tokens=8, return_full_text=False) == text
    pieces = list(client.text_generation(PROMPT, max_new_tokens=8, stream=True))
    assert ("".join(pieces), len(pieces)) == (text, 8)


def test_details(client: Any, any_server: Running) -> None:
    asked = {"max_new_tokens": 6, "return_full_text": False, "details": True, "top_n_tokens": 2}
    whole = client.text_generation(PROMPT, decoder_input_details=True, **asked)
    details = whole.details
    assert whole.generated_text == engines(any_server, 6)
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("length", 6, None)
    assert [token.text for token in details.prefill][1:] == ["Once", " upon", " a", " time"]
    assert (details.prefill[0].logprob, details.prefill[1].logprob < 0) == (None, True)
    assert "".join(token.text for token in details.tokens) == whole.generated_text
    assert [len(top) for top in details.top_tokens] == [2] * 6
    events = list(client.text_generation(PROMPT, stream=True, **asked))
    assert [event.index for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.token.logprob for event in events] == [token.logprob for token in details.tokens]
    assert events[-1].generated_text == whole.generated_text
    assert [event.details for event in events[:-1]] == [None] * 5
    last = events[-1].details
    assert (last.finish_reason, last.generated_tokens, last.input_length) == ("length", 6, len(details.prefill))


def test_settings(client: Any, any_server: Running) -> None:
    stopped = client.text_generation(PROMPT, max_new_tokens=40, stop=[" little"], details=True, return_full_text=False)
    assert (stopped.generated_text[-7:], stopped.details.finish_reason) == (" little", "stop_sequence")
    drawn = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12}
    first, again, other = (client.text_generation(PROMPT, seed=seed, **drawn) for seed in (1, 1, 2))
    assert (first == again, first == other) == (True, False)
    best = client.text_generation(PROMPT, best_of=2, details=True, **drawn).details
    (second,) = best.best_of_sequences
    assert sum(t.logprob for t in best.tokens) / 12 >= sum(t.logprob for t in second.tokens) / 12
    every = {
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
        "top_k": 9,
        "top_p": 0.9,
        "typical_p": 0.95,
        "seed": 4,
    }
    kept = client.text_generation(PROMPT, truncate=2, max_new_tokens=6, return_full_text=False, **every)
    assert kept == engines(any_server, 6, truncate=2, **every)


def test_grammars(client: Any) -> None:
    asked = {"max_new_tokens": 300, "return_full_text": False}
    assert re.fullmatch(
        "[0-9]{3}", client.text_generation(PROMPT, grammar={"type": "regex", "value": "[0-9]{3}"}, **asked)
    )
    found = json.loads(client.text_generation(PROMPT, grammar={"type": "json", "value": SCHEMA}, **asked))
    assert set(found) == {"tame", "kind"}
    pieces = client.text_generation(PROMPT, grammar={"type": "json", "value": SCHEMA}, stream=True, **asked)
    assert json.loads(text_of(pieces)) == found


def test_line_separators(client: Any) -> None:
    """The client splits a stream's lines as str.splitlines does."""
    text = "a\u2028b\u2029c\x85d"
    asked = {"grammar": {"type": "regex", "value": text}, "max_new_tokens": 40, "return_full_text": False}
    assert client.text_generation(PROMPT, **asked) == text
    assert text_of(client.text_generation(PROMPT, stream=True, **asked)) == text
    form = {"response_format": {"type": "regex", "value": text}, "max_tokens": 40}
    pieces = client.chat_completion(MESSAGES, stream=True, **form)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"top_p": 1.5}, "Input validation error: `top_p` must be > 0.0 and < 1.0"),
        ({"max_new_tokens": 5000}, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096."),
        ({"stop": list("abcde")}, "Input validation error: `stop` supports up to 4 stop sequences. Given: 5"),
        ({"adapter_id": "one"}, "parameters.adapter_id: not supported: adapters (LoRA) are not supported"),
    ],
)
def test_refused_texts(base_url: str, options: dict[str, Any], why: str) -> None:
    for stream in (False, True):
        with pytest.raises(ValidationError) as caught:
            client_of(base_url).text_generation(PROMPT, stream=stream, **options)
        assert str(caught.value).startswith(why)


def test_refused_chats(any_server: Running, client: Any) -> None:
    kind = BadRequestError if any_server.server.api.settings.dialect == "openai" else HfHubHTTPError
    for stream in (False, True):
        with pytest.raises(kind, match="temperature: Input should be less than or equal to 2") as caught:
            client.chat_completion(MESSAGES, temperature=7.0, stream=stream)
        assert caught.value.response.status_code == (400 if kind is BadRequestError else 422)


@pytest.mark.parametrize(("dialect", "status"), [("openai", 503), ("tgi", 429)])
def test_a_full_server(dialect: str, status: int) -> None:
    with running(dialect=dialect, max_num_seqs=1, max_queued=1, api_keys=("key",)) as server:
        client = client_of(server.url, token="key")
        stream = client.chat_completion(MESSAGES, **LONG)
        next(stream)
        second = threading.Thread(target=client.text_generation, args=(PROMPT,), kwargs={"max_new_tokens": 1})
        second.start()
        while not server.server.api.runtime.admission.full:
            assert second.is_alive()
        with pytest.raises(OverloadedError, match="Model is overloaded"):
            client.text_generation(PROMPT)
        with pytest.raises(HfHubHTTPError, match="Model is overloaded") as caught:
            client.chat_completion(MESSAGES)
        assert caught.value.response.status_code == status
        stream.close()
        second.join(30)
        assert server.idle()
        with pytest.raises(UnknownError, match="Unauthorized"):
            client_of(server.url, token="other").text_generation(PROMPT)


def test_errors_in_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no more memory")

    with running() as server:
        client = client_of(server.url)
        chat = client.chat_completion(MESSAGES, **LONG)
        next(chat)
        stream = client.text_generation(PROMPT, max_new_tokens=4000, do_sample=True, stream=True)
        next(stream)
        monkeypatch.setattr(server.served.model._runner, "start", fail)
        for failed in (stream, chat):
            with pytest.raises(GenerationError, match=r"Request failed during generation: .*no more memory"):
                list(failed)


def test_a_stream_that_is_cut() -> None:
    with running() as server:
        client = client_of(server.url)
        stream = client.text_generation(PROMPT, max_new_tokens=4000, do_sample=True, stream=True)
        next(stream)
        server.served.engine.close()
        with pytest.raises(IncompleteGenerationError, match="Incomplete generation"):
            list(stream)


def test_health_and_info(any_server: Running) -> None:
    client: Any = InferenceClient(model=any_server.url, provider="hf-inference")
    assert client.health_check()
    info = client.get_endpoint_info()
    assert (info["model_id"], info["max_total_tokens"], info["max_input_tokens"]) == ("demo_model", 4096, 4095)
