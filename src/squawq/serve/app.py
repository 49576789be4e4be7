"""The server's routes: which path does what, in which dialect its errors are, and what stands around all of them.

What a body means and what a reply looks like is chat.py's, completions.py's, tokenization.py's and tgi.py's; how a
request is run is generation.py's.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from squawq import __version__
from squawq.engine.engine import Stats
from squawq.serve.call import Call
from squawq.serve.errors import ApiError
from squawq.serve.http import Guard, send_bytes, send_error, send_json
from squawq.serve.metrics import Metrics
from squawq.serve.model import Served
from squawq.serve.openai.chat import ChatBody, chat, read, render
from squawq.serve.openai.completions import completion
from squawq.serve.openai.tokenize import detokenize, tokenize, tokenizer_info
from squawq.serve.openapi import document
from squawq.serve.runtime import Parse, Runtime
from squawq.serve.tgi import generate as tgi

logger = logging.getLogger("squawq.serve")
Handler = Callable[[Scope, Receive, Send], Awaitable[None]]
# TGI's own routes, whose errors are TGI's in either dialect.
TGI_PATHS = frozenset(("/", "/v1", "/generate", "/generate_stream", "/info", "/chat_tokenize"))
EMBEDDINGS = "/v1/embeddings is not supported: this server generates text; embed with an encoder model's server"


class Api:
    """The routes of one model."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.settings = served.settings
        self._table: list[tuple[str, str, Handler]] = [
            ("POST", "/v1/chat/completions", self._generate(chat)),
            ("POST", "/v1/completions", self._generate(completion)),
            ("POST", "/v1/embeddings", self._refuse("unsupported", EMBEDDINGS)),
            ("GET", "/v1/models", self._show(self._models)),
            ("GET", "/v1/models/{model:path}", self._model),
            ("POST", "/tokenize", self._answer(_tokenize)),
            ("POST", "/detokenize", self._answer(detokenize)),
            ("GET", "/tokenizer_info", self._show(lambda: tokenizer_info(served))),
            ("POST", "/", self._generate(_tgi(compat=True))),
            ("POST", "/v1", self._generate(_tgi(compat=True))),  # a client's base_url may end so
            ("POST", "/generate", self._generate(_tgi())),
            ("POST", "/generate_stream", self._generate(_tgi(stream=True))),
            ("POST", "/chat_tokenize", self._answer(_chat_tokenize)),
            ("POST", "/invocations", self._generate(_invocation)),
            ("GET", "/info", self._show(lambda: tgi.info(served))),
            ("GET", "/", self._health),
            ("GET", "/health", self._health),
            ("GET", "/ping", self._health),
            ("POST", "/ping", self._health),
            ("GET", "/livez", self._health),
            ("GET", "/readyz", self._ready),
            ("GET", "/metrics", self._metrics),
            ("GET", "/version", self._show(lambda: {"version": __version__})),
            ("GET", "/openapi.json", self._show(lambda: document((m, p) for m, p, _ in self._table))),
        ]
        self.metrics = Metrics(served.name, self._stats, {path for _, path, _ in self._table})
        self.runtime = Runtime(served, self.metrics)

    def _stats(self) -> Stats:
        """The engine's figures; requests that it has not got yet wait, too."""
        stats = self.served.engine.stats()
        return replace(stats, waiting=stats.waiting + self.runtime.unchecked)

    def app(self) -> ASGIApp:
        """The ASGI application."""
        handlers: dict[str, dict[str, Handler]] = {}
        for method, path, handler in self._table:
            handlers.setdefault(path, {})[method] = handler
        routes = [
            Route(path, self._endpoint(path, methods), methods=list(methods)) for path, methods in handlers.items()
        ]
        inner = Starlette(routes=routes, exception_handlers={HTTPException: self._not_ours}, lifespan=self._lifespan)
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

    def _endpoint(self, path: str, handlers: Mapping[str, Handler]) -> ASGIApp:
        """One path's handlers by method; what they raise is answered in the form of the path."""
        return _Endpoint(path, handlers, self.settings.tgi, tgi_route=path in TGI_PATHS)

    def _generate(self, parse: Parse) -> Handler:
        return lambda scope, receive, send: self.runtime.handle(scope, receive, send, parse)

    def _answer(self, answer: Callable[[Mapping[str, Any], Served], Any]) -> Handler:
        """A handler for what is computed from a body without the engine."""
        return lambda scope, receive, send: self.runtime.answer(
            scope, receive, send, lambda raw: answer(raw, self.served)
        )

    @staticmethod
    def _show(value: Callable[[], Any]) -> Handler:
        """A handler for a value that asks for nothing."""
        return lambda _, __, send: send_json(send, value())

    @staticmethod
    def _refuse(kind: str, why: str) -> Handler:
        async def handle(*_: Any) -> None:
            raise ApiError(kind, why)

        return handle

    def _models(self) -> dict[str, Any]:
        served = self.served
        created, owner = (0, served.name) if self.settings.tgi else (served.started, "squawq")
        common = {"object": "model", "created": created, "owned_by": owner, "root": served.name}
        data = [{"id": name, **common, "parent": None, "max_model_len": served.max_len} for name in served.names]
        return {"object": "list", "data": data}

    async def _model(self, scope: Scope, _: Receive, send: Send) -> None:
        """One of the models, whose name may have slashes."""
        name = scope["path_params"]["model"]
        found = next((model for model in self._models()["data"] if model["id"] == name), None)
        if found is None:
            raise ApiError("not_found", f"The model `{name:.100}` does not exist.", "model")
        await send_json(send, found)

    async def _health(self, _: Scope, __: Receive, send: Send) -> None:
        """Liveness: 200 while the engine lives, however full its queue is; with 503 it should be started again."""
        if not self.served.engine.alive:
            raise ApiError("unhealthy", "unhealthy")
        await send_bytes(send, 200, b"", "text/plain")

    async def _ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Readiness: with 503 the server should get no new requests for now."""
        if self.runtime.draining or self.runtime.admission.full:
            raise ApiError("unavailable", "shutting down" if self.runtime.draining else "the queue is full")
        await self._health(scope, receive, send)

    async def _metrics(self, scope: Scope, _: Receive, send: Send) -> None:
        accept = dict(scope["headers"]).get(b"accept", b"").decode("latin-1")
        body, kind = self.metrics.render(accept)
        await send_bytes(send, 200, body, kind)

    async def _not_ours(self, _: Any, error: Exception) -> Any:
        """Starlette's own refusals (no such path, no such method) in our form."""
        assert isinstance(error, HTTPException)

        async def answer(scope: Scope, _: Receive, send: Send) -> None:
            path, method = scope["path"][:100], scope["method"][:20]
            refusal = ApiError("not_found", f"there is no route {path}")
            if error.status_code == 405:
                refusal = ApiError("method", f"{path} does not take {method}", headers=error.headers)
            await send_error(send, refusal, self.settings.tgi, tgi_route=scope["path"] in TGI_PATHS)

        return answer


class _Endpoint:
    """A path: its handlers by method. Errors become answers; after an answer has begun, they end the connection."""

    def __init__(self, path: str, handlers: Mapping[str, Handler], tgi: bool, *, tgi_route: bool) -> None:
        self._path, self._handlers, self._tgi, self._tgi_route = path, handlers, tgi, tgi_route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route_template"] = self._path  # for the count
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._handlers[method](scope, receive, answer)
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.exception("a request failed")
            if begun:
                raise
            # No name for the refusal here: a cycle with its traceback would keep the request, and a grammar's process.
            await send_error(send, _refusal(error), self._tgi, tgi_route=self._tgi_route)


def _metrics_alone(app: ASGIApp, port: int) -> ASGIApp:
    """The application, of which this port has nothing but the metrics, with the same keys."""

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["server"][1] == port and scope["path"] != "/metrics":
            await send_error(send, ApiError("not_found", "this port has /metrics alone"), tgi=False, tgi_route=False)
        else:
            await app(scope, receive, send)

    return route


def _refusal(error: Exception) -> ApiError:
    return error if isinstance(error, ApiError) else ApiError("internal", "internal error")


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
