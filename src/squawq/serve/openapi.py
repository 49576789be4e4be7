"""The server's OpenAPI document, from the routes and the classes that check their bodies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from squawq import __version__
from squawq.serve.chat import ChatBody
from squawq.serve.completions import CompletionBody
from squawq.serve.fields import Body
from squawq.serve.tgi import GenerateBody
from squawq.serve.tokenization import DetokenizeBody, TokenizeBody, TokenizeChatBody

BODIES: Mapping[str, tuple[type[Body], ...]] = {
    "/": (GenerateBody,),
    "/v1": (GenerateBody,),
    "/generate": (GenerateBody,),
    "/generate_stream": (GenerateBody,),
    "/v1/chat/completions": (ChatBody,),
    "/v1/completions": (CompletionBody,),
    "/tokenize": (TokenizeBody, TokenizeChatBody, GenerateBody),
    "/detokenize": (DetokenizeBody,),
    "/chat_tokenize": (ChatBody,),
    "/invocations": (GenerateBody, ChatBody, CompletionBody),
}
STREAMS = frozenset(("/", "/v1", "/generate_stream", "/v1/chat/completions", "/v1/completions", "/invocations"))
REFUSALS = ("400", "401", "404", "408", "413", "415", "422", "424", "429", "431", "500", "501", "503")


def document(routes: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """OpenAPI 3.1 of (method, path) routes."""
    models = sorted({model for group in BODIES.values() for model in group}, key=lambda model: model.__name__)
    names, shared = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {}
    for method, route in routes:
        path = route.replace(":path", "")  # Starlette's mark of a parameter that may hold slashes
        operation: dict[str, Any] = {
            "operationId": f"{method.lower()}{path.replace('/', '_').replace('.', '_')}",
            "responses": _responses(method, path),
        }
        if method == "POST" and path in BODIES:
            schemas = [names[model, "validation"] for model in BODIES[path]]
            schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        if names_in := re.findall(r"{(\w+)}", path):
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names_in
            ]
        paths.setdefault(path, {})[method.lower()] = operation
    components = {"schemas": {**shared.get("$defs", {}), "Error": _ERROR}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "squawq", "version": __version__},
        "paths": paths,
        "components": {**components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


_ERROR = {
    "type": "object",
    "properties": {
        "error": {"anyOf": [{"type": "string"}, {"type": "object"}]},
        "error_type": {"type": "string"},
    },
    "required": ["error", "error_type"],
}


def _responses(method: str, path: str) -> dict[str, Any]:
    good: dict[str, Any] = {}
    if path == "/metrics":
        good = {"text/plain": {}, "application/openmetrics-text": {}}
    elif path in ("/health", "/livez", "/readyz", "/ping") or (method, path) == ("GET", "/"):
        good = {"text/plain": {}}
    else:
        good = {"application/json": {}}
    if path in STREAMS and method == "POST":
        good["text/event-stream"] = {}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    refusals = {code: {"description": "refused", "content": error} for code in REFUSALS}
    return {"200": {"description": "done", "content": good}, **refusals}
