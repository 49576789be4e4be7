"""A stand-in of the Hub's HTTP API on loopback: what a push takes, with its failures on order.

Tokens, repositories, branches, the preupload check, LFS objects (one PUT each, checked by SHA-256) and commits. A
branch is a mapping of paths to bytes. Knows no Xet: clients are told to leave it (HF_HUB_DISABLE_XET).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standin"
OWNER = "me"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """The state, and what is to go wrong: `drops` PUTs are cut off in their middle; from the `stall_from`th object on
    PUTs hang until `go` is set; the next whole GET of a file in `damages` has another last byte."""

    endpoint: str = ""
    repos: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    puts: Counter[str] = field(default_factory=Counter)
    requests: list[str] = field(default_factory=list)
    damages: dict[str, bool] = field(default_factory=dict)
    drops: int = 0
    stall_from: int | None = None
    go: Event = field(default_factory=Event)
    lock: Any = field(default_factory=Lock)

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables that send a process's huggingface_hub here."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return {**kept, **own, "HF_HUB_DISABLE_TELEMETRY": "1", **({"HF_TOKEN": token} if token else {})}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self.route(b"")

    def do_HEAD(self) -> None:
        self.route(b"")

    def do_POST(self) -> None:
        self.route(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def do_PUT(self) -> None:
        oid = self.path.rpartition("/")[2]
        length = int(self.headers["Content-Length"])
        hub = self.hub
        with hub.lock:
            drop = hub.drops > 0
            hub.drops -= drop
            stall = hub.stall_from is not None and sum(hub.puts.values()) >= hub.stall_from
            if not drop and not stall:
                hub.puts[oid] += 1
        if drop:
            self.rfile.read(length // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        if stall:
            hub.go.wait(30)
            self.close_connection = True
            return None
        content = self.rfile.read(length)
        if hashlib.sha256(content).hexdigest() != oid:
            return self.reply(400, {"error": "another content than announced"})
        hub.objects[oid] = content
        return self.reply(200, {})

    def route(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid user token."})
        if path == "/api/whoami-v2":
            return self.reply(200, {"name": OWNER, "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return self.reply(200, {"warnings": [], "errors": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body)["objects"])
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo = self.hub.repos.get("/".join(parts[:2]))
        if repo is None:
            return self.reply(404, {"error": "Repository not found"}, code="RepoNotFound")
        if path.startswith("/api/models/"):
            return self.api(repo, "/".join(parts[:2]), parts[2:], body)
        return self.resolve(repo, parts[2:])

    def create(self, asked: dict[str, Any]) -> None:
        owner = asked.get("organization") or OWNER
        name = f"{owner}/{asked['name']}"
        if owner != OWNER:
            return self.reply(403, {"error": f"You don't have the rights to create a model under {owner}"})
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repos:
            return self.reply(409, {"error": "You already created this model repo", **url})
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.repos[name] = Repository(private)
        return self.reply(200, url)

    def batch(self, objects: list[dict[str, Any]]) -> None:
        answers = []
        for entry in objects:
            action = {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}", "header": {}}}
            answers.append({**entry, **({} if entry["oid"] in self.hub.objects else {"actions": action})})
        self.reply(200, {"transfer": "basic", "objects": answers})

    def api(self, repo: Repository, name: str, parts: list[str], body: bytes) -> None:
        verb, branch = (*parts, "", "main")[:2] if parts else ("", "main")
        branch = "main" if branch == COMMIT else branch
        if verb == "branch":
            if branch in repo.branches:
                return self.reply(409, {"error": "Reference already exists"})
            repo.branches[branch] = dict(repo.branches["main"])
            return self.reply(200, {})
        if branch not in repo.branches:
            return self.reply(404, {"error": "Invalid rev id"}, code="RevisionNotFound")
        files = repo.branches[branch]
        if verb == "tree":
            return self.reply(200, [entry(path, content) for path, content in files.items()])
        if verb == "preupload":
            return self.reply(200, {"files": [self.mode(files, entry) for entry in json.loads(body)["files"]]})
        if verb == "commit":
            return self.commit(repo, name, files, [json.loads(line) for line in body.splitlines()])
        siblings = [sibling(path, content) for path, content in files.items()]
        info = {"id": name, "sha": COMMIT, "siblings": siblings, "private": repo.private, "tags": [], "downloads": 0}
        return self.reply(200, info)

    def mode(self, files: dict[str, bytes], entry: dict[str, Any]) -> dict[str, Any]:
        large = entry["path"].endswith(".safetensors")
        found = files.get(entry["path"])
        oid = None if found is None else hashlib.sha256(found).hexdigest() if large else git_oid(found)
        mode = "lfs" if large else "regular"
        return {"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def commit(self, repo: Repository, name: str, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        url = f"{self.hub.endpoint}/{name}/commit/{COMMIT}"
        self.reply(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def resolve(self, repo: Repository, parts: list[str]) -> None:
        files = (
            repo.branches.get("main" if parts[1:2] == [COMMIT] else parts[1], {}) if parts[:1] == ["resolve"] else {}
        )
        content = files.get("/".join(parts[2:]))
        if content is None:
            return self.reply(404, {}, code="EntryNotFound")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_oid(content)}"'}
        whole = self.command == "GET" and "Range" not in self.headers
        if whole and self.hub.damages.pop("/".join(parts[2:]), False):
            content = content[:-1] + bytes([content[-1] ^ 1])
        if (asked := self.headers.get("Range")) and len(ends := asked.removeprefix("bytes=").split("-")) == 2:
            first, last = int(ends[0]), min(int(ends[1] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.send(206, content[first : last + 1], headers)
        return self.send(200, content, headers)

    def reply(self, status: int, value: Any, code: str | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"X-Error-Code": code} if code else {})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up, or are killed, are part of the tests."""


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file in a listing."""
    found = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if path.endswith(".safetensors"):
        found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return found


def sibling(path: str, content: bytes) -> dict[str, Any]:
    """A file in a model's description."""
    found = {"rfilename": path, "size": len(content), "blobId": git_oid(content)}
    if path.endswith(".safetensors"):
        found["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return found


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def standin() -> Iterator[Hub]:
    """A Hub of one's own while the block runs."""
    hub = Hub()
    server = Server(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.go.set()
        server.shutdown()
        server.server_close()
