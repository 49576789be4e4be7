"""The routes: one table with what each path does and how the OpenAPI document describes it, and the application.

The dialects (openai/, tgi/) read bodies and write replies; runtime.py runs requests; openapi_document.py writes the
document.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from squawq import __version__
from squawq.engine.protocol import Stats
from squawq.serve.errors import ApiError
from squawq.serve.http import Guard, JsonReply, error_reply
from squawq.serve.metrics import Metrics
from squawq.serve.model import Served
from squawq.serve.openai.chat import ChatBody, chat, read, render
from squawq.serve.openai.completions import (
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    TokenizeChatBody,
    completion,
    detokenize,
    tokenize,
    tokenizer_info,
)
from squawq.serve.openapi_document import (
    ANY,
    CHAT,
    CHAT_TOKENS,
    COMPLETION,
    EVENTS,
    GENERATED,
    HTML,
    INFO,
    MODEL,
    OPENAI,
    OPERATIONS,
    PLAIN,
    SAGEMAKER,
    TEXT,
    TGI,
    TOKEN,
    TOKENS,
    VLLM,
    RouteRow,
    document,
    json_content,
    list_of,
    object_of,
)
from squawq.serve.runtime import Call, Disconnected, Parse, Runtime
from squawq.serve.tgi import generate as tgi
from squawq.serve.web.pages import FILES, PAGES, page, wants_page, web_files

logger = logging.getLogger("squawq.serve")
# TGI's own routes, whose errors are TGI's in either dialect.
TGI_PATHS = frozenset(("/", "/v1", "/generate", "/generate_stream", "/info", "/chat_tokenize"))
EMBEDDINGS = "/v1/embeddings is not supported: this server generates text; embed with an encoder model's server"


class Api:
    """The application for one model."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.settings = served.settings
        self._paths: dict[str, list[str]] = {}  # a path's methods
        for method, path in map(str.split, ROUTES):
            self._paths.setdefault(path, []).append(method)
        self._files = web_files() if self.settings.web else {}
        labels = {*map(_template, self._paths), *map(_file_label, self._files)}
        facts = {"version": __version__, "engine": self.settings.engine, **served.device_info()}
        self.metrics = Metrics(served.name, self._stats, labels, facts)
        self.runtime = Runtime(served, self.metrics)

    def _stats(self) -> Stats:
        """The engine's figures. Requests that are not yet submitted to it count as waiting."""
        stats = self.served.engine.stats()
        return replace(stats, waiting=stats.waiting + self.runtime.unchecked)

    def app(self) -> ASGIApp:
        inner = Starlette(
            routes=[
                *(self._route(path, methods) for path, methods in self._paths.items()),
                *(_file(path, name) for path, name in self._files.items()),
            ],
            middleware=[Middleware(ExceptionMiddleware, handlers={Exception: self._failed})],
            exception_handlers={ApiError: self._refused, HTTPException: self._no_route, Disconnected: _nothing},
            lifespan=self._lifespan,
        )
        inner.router.redirect_slashes = False
        guarded: ASGIApp = Guard(inner, self.settings, self.metrics, TGI_PATHS, self._files)
        if self.settings.prometheus_port is not None:
            guarded = _metrics_alone(guarded, self.settings.prometheus_port)
        if not self.settings.allowed_origins:
            return guarded
        return CORSMiddleware(
            guarded, allow_origins=self.settings.allowed_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )

    def _route(self, path: str, methods: list[str]) -> Route:
        async def endpoint(request: Request) -> Response:
            request.scope["route_template"] = _template(path)  # the label of its metrics
            method = "GET" if request.method == "HEAD" else request.method
            return await ROUTES[f"{method} {path}"].handle(self, request)

        return Route(_template(path), endpoint, methods=methods)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self.runtime.close()

    def models(self) -> dict[str, Any]:
        served = self.served
        created, owner = (0, served.name) if self.settings.tgi else (served.started, "squawq")
        common = {
            "object": "model",
            "created": created,
            "owned_by": owner,
            "root": served.name,
            "parent": None,
            "max_model_len": served.max_len,
            "sampling_defaults": served.sampling_defaults(),
        }
        data = [{"id": name, **common} for name in served.names]
        return {"object": "list", "data": data}

    async def model(self, request: Request) -> Response:
        """One of the models, whose name may have slashes."""
        name = request.path_params["model"]
        found = next((model for model in self.models()["data"] if model["id"] == name), None)
        if found is None:
            raise ApiError("not_found", f"The model `{name:.100}` does not exist.", "model")
        return JsonReply(found)

    async def health(self, _: Request) -> Response:
        """Liveness: 200 while the engine is alive, however full its queue is. After a 503, restart the server."""
        if not self.served.engine.alive:
            raise ApiError("unhealthy", "unhealthy")
        return Response(headers={"content-type": "text/plain"})

    async def root(self, request: Request) -> Response:
        """The chat page for a browser; for others liveness, as TGI has it."""
        return page(request, PAGES["/chat"]) if self._files and wants_page(request) else await self.health(request)

    async def ready(self, request: Request) -> Response:
        """Readiness: after a 503, send no new requests for now."""
        if self.runtime.draining or self.runtime.admission.full:
            raise ApiError("unavailable", "shutting down" if self.runtime.draining else "the queue is full")
        return await self.health(request)

    async def scrape(self, request: Request) -> Response:
        body, kind = self.metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": kind})

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_reply(error, self.settings.tgi, tgi_route=request.scope["path"] in TGI_PATHS)

    async def _no_route(self, request: Request, error: Exception) -> Response:
        """Starlette's own refusals (no such path, no such method) in our form."""
        assert isinstance(error, HTTPException)
        path, method = request.scope["path"][:100], request.method[:20]
        refusal = ApiError("not_found", f"there is no route {path}")
        if error.status_code == 405:
            refusal = ApiError("method", f"{path} does not take {method}", headers=error.headers)
        return await self._refused(request, refusal)

    async def _failed(self, request: Request, error: Exception) -> Response:
        logger.error("a request failed", exc_info=error)
        return await self._refused(request, ApiError("internal", "internal error"))


def _template(path: str) -> str:
    """A path as Starlette has it: a model's name may hold slashes."""
    return path.replace("{model}", "{model:path}")


def _file(path: str, name: str) -> Route:
    """The route of a page or of one of its files."""

    async def endpoint(request: Request) -> Response:
        request.scope["route_template"] = _file_label(path)
        return page(request, name)

    return Route(path, endpoint, methods=["GET"])


def _file_label(path: str) -> str:
    """The label of a page in the metrics; all scripts and styles have one."""
    return FILES if path.startswith(f"{FILES}/") else path


async def _nothing(*_: object) -> Any:
    """No response: the client is gone."""
    return None


def _metrics_alone(app: ASGIApp, port: int) -> ASGIApp:
    """The application, which answers with nothing but metrics on this port. The API keys are the same."""

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        inner = app
        if scope["type"] == "http" and scope["server"][1] == port and scope["path"] != "/metrics":
            inner = error_reply(ApiError("not_found", "this port has /metrics alone"), tgi=False, tgi_route=False)
        await inner(scope, receive, send)

    return route


Handler = Callable[[Api, Request], Awaitable[Response]]


def _generate(parse: Parse) -> Handler:
    async def handle(api: Api, request: Request) -> Response:
        return await api.runtime.generate(request, parse)

    return handle


def _compute(work: Callable[[Mapping[str, Any], Served], Any]) -> Handler:
    """A handler whose reply needs a body, but not the engine."""

    async def handle(api: Api, request: Request) -> Response:
        return await api.runtime.compute(request, lambda raw: work(raw, api.served))

    return handle


def _show(value: Callable[[Api], Any]) -> Handler:

    async def handle(api: Api, _: Request) -> Response:
        return JsonReply(value(api))

    return handle


async def _embeddings(*_: object) -> Response:
    raise ApiError("unsupported", EMBEDDINGS)


def _tgi(*, stream: bool = False, compat: bool = False) -> Handler:
    return _generate(lambda raw, served, tenant: tgi.generate(raw, served, tenant, stream=stream, compat=compat))


def _invocation(raw: Mapping[str, Any], served: Served, tenant: str) -> Call:
    """SageMaker's one route: what a body is shows in its keys."""
    if "inputs" in raw:
        return tgi.generate(raw, served, tenant, stream=False, compat=True)
    if "messages" in raw:
        return chat(raw, served, tenant)
    if "prompt" in raw:
        return completion(raw, served, tenant)
    raise ApiError("invalid", "the body needs one of: inputs (TGI), messages (chat), prompt (completion)")


def _tokenize(raw: Mapping[str, Any], served: Served) -> Any:
    return tgi.tokens(raw, served) if "inputs" in raw else tokenize(raw, served)


def _chat_tokenize(raw: Mapping[str, Any], served: Served) -> dict[str, Any]:
    body = read(ChatBody, raw, served)
    served.check_model_name(body.model)
    text = render(body, served)
    return {"tokenize_response": tgi.chat_tokens(text, served), "templated_text": text}


LIVES = RouteRow(Api.health, OPERATIONS, "Whether the engine is alive", PLAIN)
GENERATE, TGI_BODY = "Continue a text", (tgi.GenerateBody,)
COMPAT = RouteRow(_tgi(compat=True), TGI, GENERATE, {**json_content(list_of(GENERATED)), **EVENTS}, TGI_BODY)
ROUTES: dict[str, RouteRow] = {
    "POST /v1/chat/completions": RouteRow(
        _generate(chat), OPENAI, "Answer a chat", {**json_content(CHAT), **EVENTS}, (ChatBody,)
    ),
    "POST /v1/completions": RouteRow(
        _generate(completion), OPENAI, GENERATE, {**json_content(COMPLETION), **EVENTS}, (CompletionBody,)
    ),
    "POST /v1/embeddings": RouteRow(_embeddings, OPENAI, "Not supported", {}),
    "GET /v1/models": RouteRow(
        _show(Api.models),
        OPENAI,
        "The model's names",
        json_content(object_of(object={"const": "list"}, data=list_of(MODEL))),
    ),
    "GET /v1/models/{model}": RouteRow(Api.model, OPENAI, "The model, by one of its names", json_content(MODEL)),
    "POST /tokenize": RouteRow(
        _compute(_tokenize),
        VLLM,
        "Tokens of a text or chat",
        json_content({"anyOf": [TOKENS, list_of(TOKEN)]}),
        (TokenizeBody, TokenizeChatBody, *TGI_BODY),
    ),
    "POST /detokenize": RouteRow(
        _compute(detokenize), VLLM, "Text of tokens", json_content(object_of(prompt=TEXT)), (DetokenizeBody,)
    ),
    "GET /tokenizer_info": RouteRow(
        _show(lambda api: tokenizer_info(api.served)),
        VLLM,
        "The tokenizer's settings and chat template",
        json_content(ANY),
    ),
    "POST /": COMPAT,
    "POST /v1": COMPAT,  # a client's base_url may end so
    "POST /generate": RouteRow(_tgi(), TGI, GENERATE, json_content(GENERATED), TGI_BODY),
    "POST /generate_stream": RouteRow(_tgi(stream=True), TGI, f"{GENERATE}, as a stream of events", EVENTS, TGI_BODY),
    "POST /chat_tokenize": RouteRow(
        _compute(_chat_tokenize), TGI, "A chat as text and tokens", json_content(CHAT_TOKENS), (ChatBody,)
    ),
    "POST /invocations": RouteRow(
        _generate(_invocation),
        SAGEMAKER,
        "Generate; the body's fields say how: inputs (TGI), messages (chat) or prompt (completion)",
        {**json_content({"anyOf": [list_of(GENERATED), CHAT, COMPLETION]}), **EVENTS},
        (*TGI_BODY, ChatBody, CompletionBody),
    ),
    "GET /info": RouteRow(_show(lambda api: tgi.info(api.served)), TGI, "The model and the limits", json_content(INFO)),
    "GET /": RouteRow(
        Api.root, OPERATIONS, "The chat page for a browser; else whether the engine is alive", {**PLAIN, **HTML}
    ),
    "GET /health": LIVES,
    "GET /ping": LIVES,
    "POST /ping": LIVES,
    "GET /livez": LIVES,
    "GET /readyz": RouteRow(Api.ready, OPERATIONS, "Whether new requests are accepted", PLAIN),
    "GET /metrics": RouteRow(
        Api.scrape, OPERATIONS, "Metrics for Prometheus", {**PLAIN, "application/openmetrics-text": {}}
    ),
    "GET /version": RouteRow(
        _show(lambda _: {"version": __version__}), VLLM, "The server's version", json_content(object_of(version=TEXT))
    ),
    "GET /openapi.json": RouteRow(_show(lambda _: document(ROUTES)), OPERATIONS, "This document", json_content(ANY)),
}
