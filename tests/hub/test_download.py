"""Models and data sets from the Hub, through the real huggingface_hub and datasets, against a stand-in on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import programs
import pytest

from squawq.demo import demo_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubHandler(BaseHTTPRequestHandler):
    """The few routes of the Hub's HTTP API that reading a repository takes. `repos` maps models/owner/name and
    datasets/owner/name to folders."""

    repos: ClassVar[dict[str, Path]] = {}

    def log_message(self, *_: object) -> None:
        return

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        asked = self.rfile.read(length).decode()
        name = self.path.removeprefix("/api/").partition("/paths-info/")[0]
        folder = self.repos.get(name)
        if folder is None:
            return self.reply(404, b"{}")
        files = [self.entry(path, folder) for path in files_of(folder) if str(path.relative_to(folder)) in asked]
        return self.reply(200, json.dumps(files).encode())

    def entry(self, path: Path, folder: Path) -> dict[str, object]:
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": oid}

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        for name, folder in self.repos.items():
            api = f"/api/{name}"
            page = "/" + name.removeprefix("models/")
            if path.startswith(f"{api}/tree/"):
                entries = [self.entry(file, folder) for file in files_of(folder)]
                return self.reply(200, json.dumps(entries).encode(), body=body)
            if path == api or path.startswith(f"{api}/revision/"):
                owner = name.partition("/")[2]
                siblings = [{"rfilename": str(file.relative_to(folder))} for file in files_of(folder)]
                info = {"id": owner, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
                return self.reply(200, json.dumps(info).encode(), body=body)
            if path.startswith(f"{page}/resolve/"):
                file = folder / path.removeprefix(f"{page}/resolve/").partition("/")[2]
                if file.is_file():
                    return self.reply(200, file.read_bytes(), body=body)
                return self.reply(404, b"", body=body, code="EntryNotFound")
        return self.reply(404, b"{}", body=body, code="RepoNotFound")

    def reply(self, status: int, content: bytes, *, body: bool = True, code: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if body:
            self.wfile.write(content)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment variables that send every Hub client to the stand-in."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    server.shutdown()
    server.server_close()
    HubHandler.repos.clear()


def run(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return programs.run(["-m", "squawq", *arguments], env=environment)


def test_model_by_its_id(hub: dict[str, str], tmp_path: Path) -> None:
    HubHandler.repos["models/squawq/demo"] = demo_model()
    done = run(hub, "quantize", "squawq/demo", tmp_path / "out", "--method", "rtn")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


def test_unknown_model(hub: dict[str, str], tmp_path: Path) -> None:
    done = run(hub, "quantize", "squawq/none", tmp_path / "out")
    assert done.returncode == 2
    assert "'squawq/none' is not on the Hub" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_data_set_by_its_id(hub: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": f"Story {i}. " * 40}) for i in range(30)))
    HubHandler.repos["datasets/squawq/rows"] = folder
    common = ["--samples", "8", "--seqlen", "64"]
    done = run(hub, "quantize", demo_model(), tmp_path / "out", "--calibration", "squawq/rows", *common)
    assert done.returncode == 0, done.stderr
    assert "512 calibration tokens" in done.stderr
    done = run(hub, "quantize", demo_model(), tmp_path / "out2", "--calibration", "squawq/norows", *common)
    assert done.returncode == 2
    assert "could not be read as a Hub data set" in done.stderr.splitlines()[-1]
