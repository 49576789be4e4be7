"""The routes: which path does what, and how errors are answered.

The dialects (openai/, tgi/) read bodies and write replies; runtime.py runs requests.
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
from squawq.serve.openai.completions import completion, detokenize, tokenize, tokenizer_info
from squawq.serve.openapi import document
from squawq.serve.runtime import Call, Disconnected, Parse, Runtime
from squawq.serve.tgi import generate as tgi

logger = logging.getLogger("squawq.serve")
Handler = Callable[[Request], Awaitable[Response]]
# TGI's own routes, whose errors are TGI's in either dialect.
TGI_PATHS = frozenset(("/", "/v1", "/generate", "/generate_stream", "/info", "/chat_tokenize"))
EMBEDDINGS = "/v1/embeddings is not supported: this server generates text; embed with an encoder model's server"


class Api:
    """The routes of one model."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.settings = served.settings
        self._routes: dict[str, dict[str, Handler]] = {
            "/v1/chat/completions": {"POST": self._generate(chat)},
            "/v1/completions": {"POST": self._generate(completion)},
            "/v1/embeddings": {"POST": _embeddings},
            "/v1/models": {"GET": _show(self._models)},
            "/v1/models/{model:path}": {"GET": self._model},
            "/tokenize": {"POST": self._compute(_tokenize)},
            "/detokenize": {"POST": self._compute(detokenize)},
            "/tokenizer_info": {"GET": _show(lambda: tokenizer_info(served))},
            "/": {"POST": self._generate(_tgi(compat=True)), "GET": self._health},
            "/v1": {"POST": self._generate(_tgi(compat=True))},  # a client's base_url may end so
            "/generate": {"POST": self._generate(_tgi())},
            "/generate_stream": {"POST": self._generate(_tgi(stream=True))},
            "/chat_tokenize": {"POST": self._compute(_chat_tokenize)},
            "/invocations": {"POST": self._generate(_invocation)},
            "/info": {"GET": _show(lambda: tgi.info(served))},
            "/health": {"GET": self._health},
            "/ping": {"GET": self._health, "POST": self._health},
            "/livez": {"GET": self._health},
            "/readyz": {"GET": self._ready},
            "/metrics": {"GET": self._metrics},
            "/version": {"GET": _show(lambda: {"version": __version__})},
            "/openapi.json": {"GET": _show(lambda: document(self._table()))},
        }
        self.metrics = Metrics(served.name, self._stats, set(self._routes))
        self.runtime = Runtime(served, self.metrics)

    def _table(self) -> list[tuple[str, str]]:
        return [(method, path) for path, handlers in self._routes.items() for method in handlers]

    def _stats(self) -> Stats:
        """The engine's figures. Requests that are not yet submitted to it count as waiting."""
        stats = self.served.engine.stats()
        return replace(stats, waiting=stats.waiting + self.runtime.unchecked)

    def app(self) -> ASGIApp:
        """The ASGI application."""
        inner = Starlette(
            routes=[_route(path, handlers) for path, handlers in self._routes.items()],
            middleware=[Middleware(ExceptionMiddleware, handlers={Exception: self._failed})],
            exception_handlers={ApiError: self._refused, HTTPException: self._no_route, Disconnected: _nothing},
            lifespan=self._lifespan,
        )
        inner.router.redirect_slashes = False
        guarded: ASGIApp = Guard(inner, self.settings, self.metrics, TGI_PATHS)
        if self.settings.prometheus_port is not None:
            guarded = _metrics_alone(guarded, self.settings.prometheus_port)
        if not self.settings.allowed_origins:
            return guarded
        return CORSMiddleware(
            guarded, allow_origins=self.settings.allowed_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self.runtime.close()

    def _generate(self, parse: Parse) -> Handler:
        async def handle(request: Request) -> Response:
            return await self.runtime.generate(request, parse)

        return handle

    def _compute(self, work: Callable[[Mapping[str, Any], Served], Any]) -> Handler:
        """A handler whose reply needs a body, but not the engine."""

        async def handle(request: Request) -> Response:
            return await self.runtime.compute(request, lambda raw: work(raw, self.served))

        return handle

    def _models(self) -> dict[str, Any]:
        served = self.served
        created, owner = (0, served.name) if self.settings.tgi else (served.started, "squawq")
        common = {"object": "model", "created": created, "owned_by": owner, "root": served.name}
        data = [{"id": name, **common, "parent": None, "max_model_len": served.max_len} for name in served.names]
        return {"object": "list", "data": data}

    async def _model(self, request: Request) -> Response:
        """One of the models, whose name may have slashes."""
        name = request.path_params["model"]
        found = next((model for model in self._models()["data"] if model["id"] == name), None)
        if found is None:
            raise ApiError("not_found", f"The model `{name:.100}` does not exist.", "model")
        return JsonReply(found)

    async def _health(self, _: Request) -> Response:
        """Liveness: 200 while the engine is alive, however full its queue is. After a 503, restart the server."""
        if not self.served.engine.alive:
            raise ApiError("unhealthy", "unhealthy")
        return Response(headers={"content-type": "text/plain"})

    async def _ready(self, request: Request) -> Response:
        """Readiness: after a 503, send no new requests for now."""
        if self.runtime.draining or self.runtime.admission.full:
            raise ApiError("unavailable", "shutting down" if self.runtime.draining else "the queue is full")
        return await self._health(request)

    async def _metrics(self, request: Request) -> Response:
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


def _route(path: str, handlers: Mapping[str, Handler]) -> Route:
    async def endpoint(request: Request) -> Response:
        request.scope["route_template"] = path  # the label of its metrics
        return await handlers["GET" if request.method == "HEAD" else request.method](request)

    return Route(path, endpoint, methods=list(handlers))


def _show(value: Callable[[], Any]) -> Handler:
    """A handler for a value that depends on no request."""

    async def handle(_: Request) -> Response:
        return JsonReply(value())

    return handle


async def _embeddings(_: Request) -> Response:
    raise ApiError("unsupported", EMBEDDINGS)


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


def _tgi(*, stream: bool = False, compat: bool = False) -> Parse:
    return lambda raw, served, tenant: tgi.generate(raw, served, tenant, stream=stream, compat=compat)


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
