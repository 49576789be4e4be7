"""How the server starts: sockets, refusals in one line, what its first lines say; settings that change what it does."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from running import DEFAULTS, Running, process, running

from squawq.backends.devices import check_device
from squawq.demo import demo_model
from squawq.errors import ConfigError
from squawq.serve.model import Served
from squawq.serve.server import bind, is_open, url
from squawq.serve.settings import ServerSettings

DEMO = str(demo_model())
PROMPT = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 1.0, "ignore_eos": True}


def settings(**changes: object) -> ServerSettings:
    return ServerSettings(**{**DEFAULTS, **changes})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_busy_port_is_one_line_before_the_model_is_loaded() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        command = [sys.executable, "-W", "error", "-m", "squawq", "serve", DEMO, "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"squawq: error: cannot listen on 127.0.0.1:{port}: another program listens there; choose another port "
        "(0 takes a free one), or end that program"
    ]


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("203.0.113.7", "cannot listen on 203.0.113.7:0: this machine has no such address"),
        ("no-such-host.invalid", "host is 'no-such-host.invalid', which is no address of this machine"),
        ("a" * 70, "which is no address of this machine"),
    ],
)
def test_addresses_that_cannot_be(host: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        bind(settings(host=host))


def test_a_socket_does_not_outlive_a_refusal() -> None:
    """The first port is given back when the second cannot be had."""
    port = free_port()
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(ConfigError, match="another program"):
            bind(settings(port=port, prometheus_port=busy.getsockname()[1]))
    for one in bind(settings(port=port)) or ():
        one.close()


def test_urls_and_who_may_reach_them() -> None:
    assert url(settings(host="::1"), 80) == "http://[::1]:80"
    assert url(settings(uds=Path("/tmp/s")), 0) == "/tmp/s"
    assert is_open(settings(host="0.0.0.0"))
    assert is_open(settings(host="::"))
    assert is_open(settings(host="box.example"))
    for changes in ({}, {"host": "localhost"}, {"host": "::1"}, {"host": "127.8.8.8"}):
        assert not is_open(settings(**changes))
    assert not is_open(settings(host="0.0.0.0", api_keys=("k",)))
    assert not is_open(settings(host="0.0.0.0", uds=Path("/tmp/s")))


def test_the_launcher_starts_as_tgis_own_tests_start_it(tmp_path: Path) -> None:
    """The line of integration-tests/conftest.py, with a port for metrics; what the first lines say."""
    port, metrics = free_port(), free_port()
    line = f"--model-id {DEMO} --port {port} --master-port 12345 --shard-uds-path {tmp_path}/tgi --num-shard 1"
    more = f"--trust-remote-code --disable-grammar-support --env --prometheus-port {metrics}"
    environment = {"LOG_LEVEL": "info,text_generation_router=debug", "PREFILL_CHUNKING": "1"}
    lines: list[str] = []
    arguments = [*line.split(), *more.split(), "--max-batch-total-tokens", "8192"]
    with process(arguments, environment, "squawq.serve.tgi_launcher", lines) as (_, at):
        with httpx.Client(base_url=at, timeout=60) as client:
            answer = client.post("/generate", json={"inputs": "test"})
            assert answer.status_code == 200
            grammar = {"type": "json", "value": {"properties": {"a": {"type": "boolean"}}}}
            body = {"inputs": "test", "parameters": {"grammar": grammar}}
            refused = client.post("/generate", json=body)
            assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
            assert refused.json()["error"].endswith("grammar is not supported")
            form = {"type": "json_object", "value": grammar["value"]}
            chat = {"messages": [{"role": "user", "content": "a"}], "response_format": form}
            assert client.post("/v1/chat/completions", json=chat).status_code == 422
        there = httpx.get(f"http://127.0.0.1:{metrics}/metrics")
        assert "tgi_request_count" in there.text
        for path in ("/generate", "/v1/models", "/health"):
            assert httpx.get(f"http://127.0.0.1:{metrics}{path}").status_code == 404
    text = "".join(lines)
    assert re.search(r" environment squawq=\S+ python=3\S+ torch=\S+ ", text)
    (noted,) = [line for line in lines if "these flags change nothing" in line]
    for name in ("--trust-remote-code", "--master-port", "--shard-uds-path"):
        assert f"{name}=" in noted
    assert re.search(r"WARNING .*there is no API key.* host=0\.0\.0\.0", text)
    start = re.search(
        rf"serving model=demo_model at=http://0\.0\.0\.0:{port} context=4096 device=cpu threads=\d+ "
        r"instructions=(avx512|avx2|neon|scalar|torch) cache_tokens=8192 cache_mib=32\.0\n",
        text,
    )
    assert start, text


def test_the_port_for_metrics_has_the_same_keys() -> None:
    port = free_port()
    with running(prometheus_port=port, api_keys=("k",)) as server:
        app = server.server.api.app()
        transport = httpx.ASGITransport(app)

        async def status(path: str, key: str = "") -> int:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            async with httpx.AsyncClient(transport=transport, base_url=f"http://127.0.0.1:{port}") as client:
                return (await client.get(path, headers=headers)).status_code

        assert asyncio.run(status("/metrics")) == 401
        assert asyncio.run(status("/metrics", "k")) == 200
        assert asyncio.run(status("/v1/models", "k")) == 404


def texts(server: Running, count: int = 2) -> list[str]:
    return [server.post("/v1/completions", PROMPT).json()["choices"][0]["text"] for _ in range(count)]


def test_the_servers_seed_draws_those_of_requests() -> None:
    with running(seed=5) as one:
        first = texts(one)
        tgi = {"inputs": "Once", "parameters": {"do_sample": True, "details": True, "max_new_tokens": 2}}
        seed = one.post("/generate", tgi).json()["details"]["seed"]
    with running(seed=5) as other:
        assert texts(other) == first
        assert other.post("/generate", tgi).json()["details"]["seed"] == seed
        assert texts(other) != first  # drawn on, not the same each time
    assert first[0] != first[1]


def test_tokenizer_and_sampling_defaults_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 7, "eos_token_id": 9}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((demo_model() / name).read_bytes())
    template = (demo_model() / "chat_template.jinja").exists()
    found = Served(settings(tokenizer=str(tmp_path), generation_config=str(tmp_path)))
    try:
        assert found.tokenizer.folder == tmp_path
        assert (found.defaults.top_k, found.defaults.top_p, found.eos_ids) == (7, 1.0, frozenset((9,)))
        assert (found.template is None) == template
    finally:
        found.close()


def test_without_the_models_sampling_defaults(served: Served) -> None:
    assert served.defaults.temperature == 0.6
    stored = served.config.raw["torch_dtype"]  # changes nothing on a CPU
    found = Served(settings(generation_config="vllm", dtype=stored))
    try:
        assert (found.defaults.temperature, found.defaults.top_p) == (1.0, 1.0)
        assert found.eos_ids == served.eos_ids  # a text still ends
    finally:
        found.close()
    with pytest.raises(ConfigError, match="generation_config is 'nowhere', which is no folder with"):
        Served(settings(generation_config="nowhere"))


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_without_cuda_says_just_that(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(ConfigError, match=rf"device is '{device}', but this torch \(.*\) is built for the CPU alone"):
        check_device(device)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=rf"device is '{device}', but torch \(.*\) finds no GPU here; use cpu"):
        check_device(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"device 'cuda:3' is not there; choose one of cpu, cuda, cuda:0"):
        check_device("cuda:3")


def test_what_means_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from squawq.serve import logs, server

    def stop(_: ServerSettings) -> None:
        raise ConfigError("enough")

    monkeypatch.setattr(server, "bind", stop)
    monkeypatch.setattr(
        server, "logs", SimpleNamespace(setup=lambda *_: SimpleNamespace(close=lambda _: True), event=logs.event)
    )
    caplog.set_level(logging.INFO)
    with pytest.raises(ConfigError, match="enough"):
        server.run(settings(gpu_memory_utilization=0.9, dtype="float16"))
    (record,) = [one for one in caplog.records if one.getMessage() == "these flags change nothing"]
    assert list(record.fields) == ["gpu_memory_utilization", "dtype"]  # type: ignore[attr-defined]
