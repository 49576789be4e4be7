"""The OpenAPI document of the routes (app.ROUTES). A reply's schema has the fields that are always present."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from squawq import __version__
from squawq.serve.fields import Body
from squawq.serve.openai.chat import ChatBody
from squawq.serve.openai.completions import CompletionBody, DetokenizeBody, TokenizeBody, TokenizeChatBody
from squawq.serve.tgi.generate import GenerateBody

Schema = dict[str, Any]
OPENAI, VLLM, TGI, SAGEMAKER, OPERATIONS = "OpenAI", "vLLM", "TGI", "SageMaker", "Operations"
TAGS = {
    OPENAI: "OpenAI's API, with vLLM's and TGI's further fields.",
    VLLM: "Routes that vLLM's server has besides OpenAI's.",
    TGI: "The API of text-generation-inference.",
    SAGEMAKER: "The route that Amazon SageMaker calls.",
    OPERATIONS: "Health, readiness, metrics and this document.",
}


@dataclass(frozen=True)
class RouteRow:
    """A route. content: its reply by media type; empty if the route is not supported."""

    handle: Callable[[Any, Request], Awaitable[Response]]
    tag: str
    summary: str
    content: Schema
    bodies: tuple[type[Body], ...] = ()


def object_of(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": [*properties]}


def list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def json_content(schema: Schema) -> Schema:
    return {JSON: {"schema": schema}}


def _choices(kind: str, **content: Schema) -> Schema:
    choice = object_of(index=WHOLE, finish_reason=TEXT, logprobs={"type": ["object", "null"]}, **content)
    return object_of(id=TEXT, object={"const": kind}, created=WHOLE, model=TEXT, choices=list_of(choice), usage=USAGE)


TEXT, WHOLE, ANY = {"type": "string"}, {"type": "integer"}, {"type": "object"}
USAGE = object_of(prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE)
MODEL = object_of(id=TEXT, object={"const": "model"}, created=WHOLE, owned_by=TEXT)
MESSAGE = object_of(role={"const": "assistant"}, content={"type": ["string", "null"]})
GENERATED = object_of(generated_text=TEXT)
TOKEN = object_of(id=WHOLE, text=TEXT, start=WHOLE, stop=WHOLE)
TOKENS = object_of(count=WHOLE, max_model_len=WHOLE, tokens=list_of(WHOLE))
CHAT_TOKENS = object_of(tokenize_response=list_of(TOKEN), templated_text=TEXT)
INFO = object_of(model_id=TEXT, max_input_tokens=WHOLE, max_total_tokens=WHOLE, router=TEXT, version=TEXT)
ERROR = {
    **object_of(error={"anyOf": [TEXT, object_of(message=TEXT, type=TEXT, code=WHOLE)]}, error_type=TEXT),
    "description": "OpenAI's form. In TGI's, `error` is the message.",
    "examples": [
        {
            "error": {
                "message": "max_tokens: Input should be greater than or equal to 0",
                "type": "BadRequestError",
                "param": "max_tokens",
                "code": 400,
            },
            "error_type": "validation",
        }
    ],
}
CHAT, COMPLETION = _choices("chat.completion", message=MESSAGE), _choices("text_completion", text=TEXT)
JSON, SSE = "application/json", "text/event-stream"
PLAIN: Schema = {"text/plain": {}}
HTML: Schema = {"text/html": {}}
EVENTS: Schema = {SSE: {"example": "data: {...}\n\ndata: {...}\n\n"}}
STREAMS = (
    "Set `stream` to true to receive the text while it is generated, as server-sent events (`text/event-stream`); "
    "otherwise the response is one JSON value."
)
ONLY_STREAMS = "The response is a stream of server-sent events (`text/event-stream`)."
ANY_REFUSES = (400, 401, 431, 503)  # the head, the key, a server that is full or closing
BODY_REFUSES = (404, 408, 413, 415, 422, 424, 429)
PROMPT = "Once upon a time"
EXAMPLES: dict[type[Body], tuple[str, Schema]] = {
    ChatBody: ("Chat", {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 20}),
    CompletionBody: ("Completion", {"prompt": PROMPT, "max_tokens": 20}),
    GenerateBody: ("TGI", {"inputs": PROMPT, "parameters": {"max_new_tokens": 20}}),
    TokenizeBody: ("Text", {"prompt": PROMPT}),
    TokenizeChatBody: ("Chat", {"messages": [{"role": "user", "content": "Tell me a story."}]}),
    DetokenizeBody: ("Tokens", {"tokens": [1, 2, 3]}),
}


def document(routes: Mapping[str, RouteRow]) -> Schema:
    """The document of routes by method and path, such as "GET /info"."""
    names, shared = models_json_schema(
        [(model, "validation") for model in EXAMPLES], ref_template="#/components/schemas/{model}"
    )
    bodies = {model: names[model, "validation"] for model in EXAMPLES}
    paths: Schema = {}
    for key, row in routes.items():
        method, path = key.split()
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, row, bodies)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "squawq",
            "version": __version__,
            "description": "Text generation with OpenAI's API and TGI's on one port. Where the server has API keys, "
            "requests need the header `Authorization: Bearer KEY`.",
        },
        "servers": [{"url": "/", "description": "This server"}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": {**shared.get("$defs", {}), "Error": ERROR},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "The API key, if the server has one."}
            },
        },
        "security": [{}, {"key": []}],  # a server without keys asks for none
    }


def _operation(method: str, path: str, row: RouteRow, bodies: dict[type[Body], Any]) -> Schema:
    operation: Schema = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").rstrip("_"),
        "tags": [row.tag],
        "summary": row.summary,
        "responses": _responses(path, row),
    }
    if SSE in row.content:
        operation["description"] = STREAMS if JSON in row.content else ONLY_STREAMS
    if row.bodies:
        schemas = [bodies[model] for model in row.bodies]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        content = {"schema": schema, "examples": dict(_examples(row))}
        operation["requestBody"] = {"required": True, "content": {JSON: content}}
    if given := re.findall(r"{(\w+)}", path):
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": TEXT} for name in given]
    return operation


def _examples(row: RouteRow) -> Iterator[tuple[str, Schema]]:
    """The examples of a route's bodies; also with `stream` where that is a choice."""
    for model in row.bodies:
        name, value = EXAMPLES[model]
        yield name, {"summary": name, "value": value}
        if {JSON, SSE} <= row.content.keys():
            yield f"{name}_stream", {"summary": f"{name}, streamed", "value": {**value, "stream": True}}


def _responses(path: str, row: RouteRow) -> Schema:
    codes = {*ANY_REFUSES, *(BODY_REFUSES if row.bodies else ()), *((404,) if "{" in path else ())}
    codes |= set() if row.content else {501}
    error = json_content({"$ref": "#/components/schemas/Error"})
    refusals = {str(code): {"description": HTTPStatus(code).phrase, "content": error} for code in sorted(codes)}
    return {**({"200": {"description": "OK", "content": row.content}} if row.content else {}), **refusals}
