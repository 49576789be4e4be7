"""Answers in a form, through OpenAI's own client: response_format in all its forms, and vLLM's structured_outputs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from running import MESSAGES, Running

ASKED: dict[str, Any] = {"model": "any", "messages": MESSAGES, "temperature": 0, "max_tokens": 400}


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


class Pet(BaseModel, extra="forbid"):
    kind: Literal["cat", "dog"]
    tame: bool


def test_parse(client: Any) -> None:
    parsed = client.chat.completions.parse(**ASKED, response_format=Pet).choices[0].message.parsed
    assert isinstance(parsed, Pet)
    with client.chat.completions.stream(**ASKED, response_format=Pet) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed


def test_forms_of_answers(server: Running, client: Any) -> None:
    schema = Pet.model_json_schema()
    (close,) = server.served.encode("}", special=False)
    forms: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": schema}}},
        {"response_format": {"type": "json_object"}, "logit_bias": {str(close): 100}},
        {"extra_body": {"response_format": {"type": "json_object", "value": schema}}},
        {"extra_body": {"structured_outputs": {"json": schema}}},
        {"extra_body": {"structured_outputs": {"json": json.dumps(schema)}}},
    ]
    for form in forms:
        text = client.chat.completions.create(**{**ASKED, "seed": 3, **form}).choices[0].message.content
        assert isinstance(json.loads(text), dict)
        if "logit_bias" not in form:
            Pet.model_validate_json(text)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "(cat|dog)s?!"}, "(cat|dog)s?!"),
        ({"choice": ["yes", 'no "really"']}, 'yes|no "really"'),
        ({"grammar": 'start: "a" ("b" | "c")~3'}, "a[bc]{3}"),
    ],
)
def test_structured_outputs(client: Any, form: dict[str, Any], pattern: str) -> None:
    asked = {"temperature": 1.5, "seed": 2, "max_tokens": 50, "extra_body": {"structured_outputs": form}}
    answer = client.chat.completions.create(model="any", messages=MESSAGES, **asked).choices[0]
    assert re.fullmatch(pattern, answer.message.content)
    assert answer.finish_reason == "stop"
    assert re.fullmatch(pattern, client.completions.create(model="any", prompt="Say", **asked).choices[0].text)


def test_text_is_free(client: Any) -> None:
    free = client.chat.completions.create(**{**ASKED, "max_tokens": 5}).choices[0].message.content
    asked = {**ASKED, "max_tokens": 5, "response_format": {"type": "text"}}
    assert client.chat.completions.create(**asked).choices[0].message.content == free
