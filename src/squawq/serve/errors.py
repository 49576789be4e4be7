"""Errors that are sent to clients: one exception, a table of kinds, and the JSON bodies of either dialect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_MESSAGE = 1000
RETRY_AFTER = {"Retry-After": "1"}


@dataclass(frozen=True)
class Kind:
    """Status and type of an error: vLLM's `type`, TGI's `error_type`."""

    openai_status: int
    openai_type: str
    tgi_status: int
    tgi_type: str
    headers: Mapping[str, str] = field(default_factory=dict)


KINDS = {
    "invalid": Kind(400, "BadRequestError", 422, "validation"),
    "template": Kind(400, "BadRequestError", 422, "template_error"),
    "tool": Kind(400, "BadRequestError", 422, "tool_error"),
    "batch": Kind(400, "BadRequestError", 422, "batch size exceeded"),
    "suffix": Kind(400, "BadRequestError", 422, "suffix not supported"),
    "framing": Kind(400, "BadRequestError", 400, "validation", {"Connection": "close"}),
    "unauthorized": Kind(401, "AuthenticationError", 401, "unauthorized", {"WWW-Authenticate": "Bearer"}),
    "not_found": Kind(404, "NotFoundError", 404, "not_found"),
    "method": Kind(405, "MethodNotAllowedError", 405, "method_not_allowed"),
    "slow": Kind(408, "RequestTimeoutError", 408, "timeout", {"Connection": "close"}),
    "too_large": Kind(413, "RequestTooLargeError", 413, "validation", {"Connection": "close"}),
    "media_type": Kind(415, "UnsupportedMediaTypeError", 415, "validation"),
    "headers": Kind(431, "BadRequestError", 431, "validation", {"Connection": "close"}),
    "unsupported": Kind(501, "NotImplementedError", 501, "not_implemented"),
    "overloaded": Kind(503, "ServiceUnavailableError", 429, "overloaded", RETRY_AFTER),
    "unavailable": Kind(503, "ServiceUnavailableError", 503, "unavailable", RETRY_AFTER),
    "incomplete": Kind(503, "ServiceUnavailableError", 503, "incomplete_generation", RETRY_AFTER),
    "unhealthy": Kind(503, "ServiceUnavailableError", 503, "healthcheck"),
    "generation": Kind(422, "UnprocessableEntityError", 424, "generation"),
    "internal": Kind(500, "InternalServerError", 500, "internal"),
}


class ApiError(Exception):
    """A request is answered with an error of one of KINDS. `param` names the wrong field; long messages are cut."""

    def __init__(self, kind: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None):
        message = " ".join(message.split())
        self.message = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 3] + "..."
        self.kind = KINDS[kind]
        self.name = kind
        self.param = None if param is None else param[:100]
        self.headers = {**self.kind.headers, **(headers or {})}
        super().__init__(self.message)

    def status(self, tgi: bool) -> int:
        return self.kind.tgi_status if tgi else self.kind.openai_status

    def body(self, tgi: bool, tgi_route: bool = False) -> dict[str, object]:
        """OpenAI's `error` object with TGI's `error_type`; TGI's two strings in its dialect and on its own routes."""
        if tgi or tgi_route:
            return {"error": self.message, "error_type": self.kind.tgi_type}
        return {"error": self._error(self.kind.openai_status), "error_type": self.kind.tgi_type}

    def event(self, tgi: bool) -> dict[str, object]:
        """The last event of a failed stream on a shared route: an object in both dialects, as their clients expect."""
        status = self.status(tgi)
        found = {**self._error(status), "http_status_code": status} if tgi else self._error(status)
        return {"error": found, "error_type": self.kind.tgi_type}

    def _error(self, status: int) -> dict[str, object]:
        return {"message": self.message, "type": self.kind.openai_type, "param": self.param, "code": status}
