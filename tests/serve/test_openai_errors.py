"""What OpenAI's own client makes of refusals: its class, the message that it shows, and when it tries again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from running import MESSAGES, Running, running

CHAT: dict[str, Any] = {"model": "any", "messages": MESSAGES, "max_tokens": 4}
LONG: dict[str, Any] = {"model": "any", "prompt": "Once", "max_tokens": 4000, "stream": True}
LONG |= {"extra_body": {"ignore_eos": True}}


def client_of(server: Running, key: str = "none", retries: int = 0) -> Any:
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=retries)


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with client_of(server) as found:
        yield found


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 3}, "temperature", "Input should be less than or equal to 2"),
    ({"top_p": 0}, "top_p", "Input should be greater than 0"),
    ({"max_tokens": 0}, "max_tokens", "Input should be greater than or equal to 1"),
    ({"max_tokens": 5000}, "max_tokens", "This model's maximum context length is 4096 tokens"),
    ({"n": 65}, "n", "at most 64"),
    ({"messages": []}, "messages", "List should have at least 1 item"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "Input should be 'system', 'developer'"),
    ({"messages": [{"role": "user", "content": "x" * 9000}]}, "messages", "maximum context length"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "reads text parts only"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "its keys are token ids"),
    ({"response_format": {"type": "xml"}}, "response_format", "choose one of text, json_object"),
    ({"extra_body": {"guided_json": {}, "structured_outputs": {"json": {}}}}, "guided_json", "choose one"),
    ({"extra_body": {"thinking": {"type": "enabled", "budget_tokens": 5}}}, "thinking", "without a budget"),
    ({"messages": [{"role": "user", "content": "x", "prefix": True}]}, "messages.0.prefix", "continue_final_message"),
]


@pytest.mark.parametrize(("change", "param", "message"), BAD)
def test_bad_requests(client: Any, change: dict[str, Any], param: str, message: str) -> None:
    for stream in (False,) if "stream_options" in change else (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{**CHAT, **change}, stream=stream)
        error: Any = caught.value
        assert message in error.message
        assert message in error.body["message"]
        assert (error.status_code, error.param, error.type, error.code) == (400, param, "BadRequestError", "400")


def test_completions_that_are_refused(client: Any) -> None:
    asked = {"model": "any", "max_tokens": 1}
    for change, message in (
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": [4096]}, "the model has ids 0 to 4095"),
        ({"prompt": [-1]}, "greater than or equal to 0"),
        ({"prompt": "a", "suffix": "b"}, "Suffix is not supported"),
        ({"prompt": "a", "logprobs": 21}, "logprobs is 21; at most 20"),
        ({"prompt": "a", "n": 2, "best_of": 1}, "best_of is 1; it must be at least n"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of above n cannot be streamed"),
        ({"prompt": ["a"] * 257}, "maximum allowed batch size of 256"),
    ):
        if message is None:  # a begin token is a prompt
            assert client.completions.create(**asked, **change).usage.prompt_tokens == 1
            continue
        with pytest.raises(openai.BadRequestError, match=message):
            client.completions.create(**asked, **change)


def test_what_is_not_there(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no route /v1/responses"):
        client.responses.create(model="any", input="Hello")
    with pytest.raises(openai.InternalServerError, match="/v1/embeddings is not supported") as caught:
        client.embeddings.create(model="any", input="Hello")
    assert caught.value.status_code == 501


def test_the_content_type(server: Running) -> None:
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        answer = httpx.post(server.url + "/v1/chat/completions", content=b"{}", headers=headers)
        assert answer.status_code == 415
        assert "Content-Type: application/json" in answer.json()["error"]["message"]
    kept = {"content-type": "Application/JSON; charset=utf-8"}
    assert httpx.post(server.url + "/v1/chat/completions", content=b"{}", headers=kept).status_code == 400


def test_names_and_keys() -> None:
    settings: dict[str, Any] = {"served_names": ("story", "org/alias"), "strict_model_name": True}
    with running(**settings, api_keys=("one", "two")) as server:
        for key in ("one", "two"):
            with client_of(server, key) as client:
                for name in settings["served_names"]:
                    assert client.chat.completions.create(**{**CHAT, "model": name}).model == "story"
                    assert client.models.retrieve(name).id == name
                assert [model.id for model in client.models.list()] == list(settings["served_names"])
                for wrong in ("demo_model", ""):
                    with pytest.raises(openai.NotFoundError, match=f"The model `{wrong}` does not exist") as missing:
                        client.chat.completions.create(**{**CHAT, "model": wrong})
                    assert missing.value.param == "model"
        for key in ("three", "ONE", "one two"):
            with client_of(server, key) as client:
                with pytest.raises(openai.AuthenticationError, match="Unauthorized"):
                    client.chat.completions.create(**CHAT)
                with pytest.raises(openai.AuthenticationError, match="Unauthorized"):
                    client.models.list()


@pytest.mark.parametrize(
    ("dialect", "kind", "status"),
    [("openai", openai.InternalServerError, 503), ("tgi", openai.RateLimitError, 429)],
)
def test_a_full_server(
    dialect: str, kind: type[openai.APIStatusError], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    statuses: list[int] = []
    with running(dialect=dialect, max_num_seqs=1, max_queued=1) as server, client_of(server) as client:
        first = client.completions.create(**LONG)
        next(iter(first))  # it is under way
        second = threading.Thread(target=server.post, args=("/v1/completions", {"prompt": "a", "max_tokens": 1}))
        second.start()
        assert until(lambda: server.server.api.runtime.admission.full)
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**CHAT)
        assert "Model is overloaded" in str(
            caught.value.body
        )  # TGI's error is a text, which the client's own leaves out
        assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (status, "1")

        def note(response: Any) -> None:
            statuses.append(response.status_code)
            first.close()

        hooked = openai.DefaultHttpxClient(event_hooks={"response": [note]})
        patient = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=9, http_client=hooked)
        with caplog.at_level(logging.INFO, logger="openai._base_client"), patient:
            assert patient.chat.completions.create(**CHAT).usage.completion_tokens == 4
        second.join(30)
        assert server.idle()
    assert (statuses[0], statuses[-1]) == (status, 200)
    waits = [r.args[0] for r in caplog.records if isinstance(r.args, tuple) and "Retrying request in" in r.msg]
    assert waits == [1.0] * (len(statuses) - 1)


def test_an_error_in_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails after the answer has begun comes as an event, and the client raises it."""

    def fail(*_: object) -> None:
        raise RuntimeError("no more memory")

    with running() as server, client_of(server) as client:
        stream = client.completions.create(**LONG)
        next(iter(stream))
        monkeypatch.setattr(server.served.model._runner, "start", fail)
        with pytest.raises(openai.APIError, match=r"Request failed during generation: .*no more memory"):
            list(stream)
        assert server.idle()
