"""What a server says on a terminal once it serves: the model, its addresses, and a request to paste."""

from __future__ import annotations

import ipaddress
import json
import shlex
from typing import Any

from squawq.errors import printable
from squawq.serve.model import Served
from squawq.serve.settings import ServerSettings
from squawq.stored_quant import NAMES

MESSAGE = "Tell me a story."


def welcome(served: Served, at: str) -> str:
    """Lines for people.

    Args:
        at: The server's URL, or the path of its Unix socket.
    """
    rows = {"model": _model(served), "runs on": _device(served), "context": _context(served)}
    base = _reachable(served.settings, at)
    rows |= pages(served.settings, base) | {"API": f"{base}/v1"}
    lines = [f"{name:<9} {value}" for name, value in rows.items()]
    return printable("\n".join([*lines, "try it:", curl(served, base)]), keep="\n")


def pages(settings: ServerSettings, base: str) -> dict[str, str]:
    """The addresses of the pages for browsers; none with --no-web, and no browser reaches a Unix socket."""
    if not settings.web or settings.uds is not None:
        return {}
    return {"chat": f"{base}/", "status": f"{base}/status", "API docs": f"{base}/docs"}


def curl(served: Served, base: str) -> str:
    """A request in the server's dialect, as a line for a shell."""
    settings = served.settings
    path, body = _request(served)
    words = ["curl"]
    if settings.uds is not None:
        words += ["--unix-socket", str(settings.uds)]
    if base.startswith("https") and _is_loopback(base):
        words.append("-k")  # no certificate names this address
    words += [f"{base}{path}", "-H", "Content-Type: application/json"]
    if settings.api_keys:
        words += ["-H", "Authorization: Bearer YOUR_KEY"]
    return shlex.join([*words, "-d", json.dumps(body, ensure_ascii=False)])


def _request(served: Served) -> tuple[str, dict[str, Any]]:
    if served.settings.tgi:
        return "/generate", {"inputs": MESSAGE, "parameters": {"max_new_tokens": 100}}
    if served.template is None:
        return "/v1/completions", {"model": served.name, "prompt": "Once upon a time", "max_tokens": 100}
    return "/v1/chat/completions", {"model": served.name, "messages": [{"role": "user", "content": MESSAGE}]}


def _model(served: Served) -> str:
    quant, names = served.config.quant, ", ".join(served.names)
    if quant is None:
        return f"{names} ({served.config.model_type}, 16-bit)"
    group = "whole rows" if quant.group_size == -1 else f"groups of {quant.group_size}"
    return f"{names} ({served.config.model_type}, {NAMES[served.config.quant_method]} INT{quant.bits}, {group})"


def _device(served: Served) -> str:
    facts = {"engine": "squawq", **served.device_info()}
    left_out = ("engine", "device", "cache_tokens", "cache_mib")
    kernels = ", ".join(f"{name} {value}" for name, value in facts.items() if name not in left_out)
    return f"{facts['device']}, engine {facts['engine']}" + (f", {kernels}" if kernels else "")


def _context(served: Served) -> str:
    return f"{served.max_len:,} tokens; the KV cache holds {served.engine.cache_tokens:,}"


def _reachable(settings: ServerSettings, at: str) -> str:
    """The URL for a client on this machine: an address that means all of them is none to connect to."""
    if settings.uds is not None:
        return "http://localhost"
    return at.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _is_loopback(base: str) -> bool:
    host = base.partition("//")[2].rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
