"""The server's OpenAPI document: a row per route, with the pydantic classes of its bodies. A reply's schema has the
fields that are always present.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pydantic.json_schema import models_json_schema

from squawq import __version__
from squawq.serve.fields import Body
from squawq.serve.openai.chat import ChatBody
from squawq.serve.openai.completions import CompletionBody, DetokenizeBody, TokenizeBody, TokenizeChatBody
from squawq.serve.tgi.generate import GenerateBody

Schema = dict[str, Any]
ANY_REFUSES = (400, 401, 431, 503)  # the head, the key, a server that is full or closing
BODY_REFUSES = (404, 408, 413, 415, 422, 424, 429)


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": [*properties]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
USAGE = _object(prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE)
MODEL = _object(id=TEXT, object={"const": "model"}, created=WHOLE, owned_by=TEXT)
MESSAGE = _object(role={"const": "assistant"}, content={"type": ["string", "null"]})
GENERATED = _object(generated_text=TEXT)
TOKEN = _object(id=WHOLE, text=TEXT, start=WHOLE, stop=WHOLE)
TOKENS = _object(count=WHOLE, max_model_len=WHOLE, tokens=_list(WHOLE))
INFO = _object(model_id=TEXT, max_input_tokens=WHOLE, max_total_tokens=WHOLE, router=TEXT, version=TEXT)
ERROR = _object(error={"anyOf": [TEXT, _object(message=TEXT, type=TEXT, code=WHOLE)]}, error_type=TEXT)


def _choices(kind: str, **content: Schema) -> Schema:
    choice = _object(index=WHOLE, finish_reason=TEXT, logprobs={"type": ["object", "null"]}, **content)
    return _object(id=TEXT, object={"const": kind}, created=WHOLE, model=TEXT, choices=_list(choice), usage=USAGE)


CHAT, COMPLETION = _choices("chat.completion", message=MESSAGE), _choices("text_completion", text=TEXT)
PROMPT = "Once upon a time"
EXAMPLES: dict[type[Body], Schema] = {
    ChatBody: {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 20},
    CompletionBody: {"prompt": PROMPT, "max_tokens": 20},
    GenerateBody: {"inputs": PROMPT, "parameters": {"max_new_tokens": 20}},
    TokenizeBody: {"prompt": PROMPT},
    TokenizeChatBody: {"messages": [{"role": "user", "content": "Tell me a story."}]},
    DetokenizeBody: {"tokens": [1, 2, 3]},
}


@dataclass(frozen=True)
class Row:
    """A route. content: its reply by media type; empty if the route is not supported."""

    summary: str
    content: Schema
    bodies: tuple[type[Body], ...] = ()


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


PLAIN: Schema = {"text/plain": {}}
EVENTS: Schema = {"text/event-stream": {}}
GENERATIONS = (GenerateBody, ChatBody, CompletionBody)
LIVES, TGI = Row("Whether the engine lives", PLAIN), "TGI: go on with a text"
ROWS = {
    "POST /v1/chat/completions": Row("Answer a chat", {**_json(CHAT), **EVENTS}, (ChatBody,)),
    "POST /v1/completions": Row("Go on with a text", {**_json(COMPLETION), **EVENTS}, (CompletionBody,)),
    "POST /v1/embeddings": Row("Not supported", {}),
    "GET /v1/models": Row("The model's names", _json(_object(object={"const": "list"}, data=_list(MODEL)))),
    "GET /v1/models/{model}": Row("The model, by one of its names", _json(MODEL)),
    "POST /tokenize": Row(
        "Tokens of a text or chat",
        _json({"anyOf": [TOKENS, _list(TOKEN)]}),
        (TokenizeBody, TokenizeChatBody, GenerateBody),
    ),
    "POST /detokenize": Row("Text of tokens", _json(_object(prompt=TEXT)), (DetokenizeBody,)),
    "GET /tokenizer_info": Row("The tokenizer's settings and chat template", _json({"type": "object"})),
    "POST /": Row(TGI, {**_json(_list(GENERATED)), **EVENTS}, (GenerateBody,)),
    "POST /v1": Row(TGI, {**_json(_list(GENERATED)), **EVENTS}, (GenerateBody,)),
    "POST /generate": Row(TGI, _json(GENERATED), (GenerateBody,)),
    "POST /generate_stream": Row(f"{TGI}, in events", EVENTS, (GenerateBody,)),
    "POST /chat_tokenize": Row(
        "TGI: a chat as text and tokens",
        _json(_object(tokenize_response=_list(TOKEN), templated_text=TEXT)),
        (ChatBody,),
    ),
    "POST /invocations": Row(
        "SageMaker: what to do shows in the body",
        {**_json({"anyOf": [_list(GENERATED), CHAT, COMPLETION]}), **EVENTS},
        GENERATIONS,
    ),
    "GET /info": Row("TGI: the model and the limits", _json(INFO)),
    "GET /": LIVES,
    "GET /health": LIVES,
    "GET /ping": LIVES,
    "POST /ping": LIVES,
    "GET /livez": LIVES,
    "GET /readyz": Row("Whether requests are taken", PLAIN),
    "GET /metrics": Row("Metrics for Prometheus", {**PLAIN, "application/openmetrics-text": {}}),
    "GET /version": Row("The server's version", _json(_object(version=TEXT))),
    "GET /openapi.json": Row("This document", _json({"type": "object"})),
}


def document(routes: Iterable[tuple[str, str]]) -> Schema:
    """OpenAPI 3.1 of (method, path) routes."""
    names, shared = models_json_schema(
        [(model, "validation") for model in EXAMPLES], ref_template="#/components/schemas/{model}"
    )
    bodies = {model: names[model, "validation"] for model in EXAMPLES}
    paths: Schema = {}
    for method, route in routes:
        path = route.replace(":path", "")  # Starlette's mark of a parameter that may hold slashes
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, bodies)
    return {
        "openapi": "3.1.0",
        "info": {"title": "squawq", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**shared.get("$defs", {}), "Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],  # a server without keys asks for none
    }


def _operation(method: str, path: str, bodies: dict[type[Body], Any]) -> Schema:
    row = ROWS[f"{method} {path}"]
    operation: Schema = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").rstrip("_"),
        "summary": row.summary,
        "responses": _responses(path, row),
    }
    if row.bodies:
        schemas = [bodies[model] for model in row.bodies]
        examples = {model.__name__: {"value": EXAMPLES[model]} for model in row.bodies}
        content = {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}, "examples": examples}
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    if given := re.findall(r"{(\w+)}", path):
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": TEXT} for name in given]
    return operation


def _responses(path: str, row: Row) -> Schema:
    codes = {*ANY_REFUSES, *(BODY_REFUSES if row.bodies else ()), *((404,) if "{" in path else ())}
    codes |= set() if row.content else {501}
    error = _json({"$ref": "#/components/schemas/Error"})
    refusals = {str(code): {"description": HTTPStatus(code).phrase, "content": error} for code in sorted(codes)}
    return {**({"200": {"description": "OK", "content": row.content}} if row.content else {}), **refusals}
