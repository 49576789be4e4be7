"""The files of this folder as HTTP responses."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath

from starlette.requests import Request
from starlette.responses import Response

FILES = "/web"  # the path below which scripts, styles and images lie
PAGES = {"/chat": "chat.html", "/status": "status.html", "/docs": "docs.html"}
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Scripts and styles are this server's files alone; a page sends requests to this server alone, and is in no frame.
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}


def web_files() -> dict[str, str]:
    """Each file of the pages by its URL path. Every path is a row here: none is looked up on the disk."""
    found = dict(PAGES)

    def add(folder: Traversable, inside: str) -> None:
        for entry in folder.iterdir():
            name = f"{inside}{entry.name}"
            if entry.is_dir():
                add(entry, f"{name}/")
            elif PurePosixPath(name).suffix in MEDIA_TYPES and name not in PAGES.values():
                found[f"{FILES}/{name}"] = name

    add(files(__package__), "")
    return found


def page(request: Request, name: str) -> Response:
    """A file as the response, or 304 where the browser has this version of it."""
    file = _read(name)
    headers = {
        "etag": file.tag,
        "cache-control": "no-cache",  # the browser asks each time, and gets 304 if nothing changed
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "content-security-policy": "; ".join(f"{key} {value}" for key, value in POLICY.items()),
        "vary": "Accept, Accept-Encoding",
    }
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    headers["content-type"] = file.media_type
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(file.gzipped, headers={**headers, "content-encoding": "gzip"})
    return Response(file.content, headers=headers)


def wants_page(request: Request) -> bool:
    """Whether a browser asks, not a client of the API."""
    return "text/html" in request.headers.get("accept", "")


@dataclass(frozen=True)
class _File:
    content: bytes
    gzipped: bytes
    media_type: str
    tag: str  # weak: the same for both encodings


@cache
def _read(name: str) -> _File:
    content = files(__package__).joinpath(name).read_bytes()
    tag = f'W/"{hashlib.sha256(content).hexdigest()[:32]}"'
    return _File(content, gzip.compress(content), MEDIA_TYPES[PurePosixPath(name).suffix], tag)
