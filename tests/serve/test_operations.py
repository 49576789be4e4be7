"""The server in operation, over real sockets: hang-ups, limits, slow readers and writers, health, TLS, CORS."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from running import MESSAGES, Running, running

from squawq.engine.request import Output
from squawq.serve import limits
from squawq.serve.openai.completions import CompletionCall
from squawq.serve.tgi import generate as tgi

LONG = {"prompt": "Once upon a time", "max_tokens": 3000, "ignore_eos": True}
CHAT = {"messages": MESSAGES, "max_tokens": 8}


def raw(server: Running, data: bytes, seconds: float = 20) -> bytes:
    """What the server sends back for bytes, until it closes or so many seconds have passed."""
    with socket.create_connection(address(server), timeout=seconds) as connection:
        connection.sendall(data)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received


def address(server: Running) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def request(path: str, body: object, *headers: str) -> bytes:
    text = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(text)}"]
    return "\r\n".join([*lines, *headers]).encode() + b"\r\n\r\n" + text


def until(condition: object, seconds: float = 20) -> bool:
    assert callable(condition)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
def test_a_hang_up_aborts(server: Running, stream: bool, path: str) -> None:
    body = {**LONG, "stream": stream}
    if path == "/generate":
        path = "/generate_stream" if stream else path
        body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 3000, "repetition_penalty": 1.5}}
    with socket.create_connection(address(server)) as connection:
        connection.sendall(request(path, body))
        assert until(lambda: server.served.engine.stats().running == 1)
    assert server.idle(), server.served.engine.stats()


def test_many_hang_up_and_one_stays(server: Running) -> None:
    connections = [socket.create_connection(address(server)) for _ in range(60)]
    for connection in connections:
        connection.sendall(request("/v1/completions", {**LONG, "stream": True}))
    assert until(lambda: server.served.engine.stats().running > 30)
    for connection in connections:
        connection.close()
    answer = server.post("/v1/completions", {"prompt": "Once", "max_tokens": 10, "ignore_eos": True})
    assert answer.json()["usage"]["completion_tokens"] == 10
    assert server.idle()


def test_a_full_server_says_so_and_stays_healthy() -> None:
    with running(max_num_seqs=1, max_queued=1) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as first:
            lines = first.iter_lines()
            next(lines)
            second = threading.Thread(target=server.post, args=("/v1/completions", {"prompt": "a", "max_tokens": 1}))
            second.start()
            assert until(lambda: server.server.api.runtime.in_flight == 2)
            refused = server.post("/v1/completions", {"prompt": "a"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["error"]["type"] == "ServiceUnavailableError"
            assert server.post("/generate", {"inputs": "a"}).json() == {
                "error": "Model is overloaded",
                "error_type": "overloaded",
            }
            assert server.post("/generate", {"inputs": "a"}).status_code == 429
            assert [server.get(path).status_code for path in ("/health", "/livez", "/readyz")] == [200, 200, 503]
        second.join(30)
        assert server.idle()
        assert server.get("/readyz").status_code == 200
        assert 'vllm:admission_rejections_total{model_name="demo_model",reason="overloaded"} 3.0' in (
            server.get("/metrics").text
        )


def test_many_requests_wait_for_their_turn() -> None:
    """As many as `vllm bench serve` sends at once by default wait; none is refused."""
    with running(max_num_seqs=8) as server:
        connections = [socket.create_connection(address(server), timeout=120) for _ in range(300)]
        for connection in connections:
            connection.sendall(request("/v1/completions", {"prompt": "Once", "max_tokens": 2, "ignore_eos": True}))
        statuses = []
        for connection in connections:
            statuses.append(connection.recv(15))
            connection.close()
        assert set(statuses) == {b"HTTP/1.1 200 OK"}
        assert server.idle()


def test_what_cannot_be_held_is_refused() -> None:
    with running(max_num_seqs=1, max_queue_bytes=60_000) as server:
        held = [socket.create_connection(address(server), timeout=20) for _ in range(2)]
        for connection in held:
            connection.sendall(request("/v1/completions", LONG))
        runtime = server.server.api.runtime
        assert until(lambda: runtime.in_flight == 2 and runtime.admission.load.size > 2 * 16_000)
        refused = server.post("/v1/completions", {"prompt": [5] * 500, "max_tokens": 1})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert server.get("/readyz").status_code == 200, "there is room for less"
        for connection in held:
            connection.close()
        assert until(lambda: runtime.admission.load.size == 0)
        alone = {"prompt": [5] * 2000, "max_tokens": 1}  # holds more than all may, but nobody else does
        assert server.post("/v1/completions", alone).status_code == 200
        assert until(lambda: runtime.admission.load.size == 0)


def test_a_stream_that_waits_has_begun_when_a_comment_was_sent() -> None:
    """Then its end has no status of its own: it is an event."""
    with (
        running(max_num_seqs=1, queue_timeout=0.5, keep_alive_interval=0.05) as server,
        socket.create_connection(address(server)) as first,
    ):
        first.sendall(request("/v1/completions", {**LONG, "stream": True}))
        assert until(lambda: server.served.engine.stats().running == 1)
        late = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "stream": True})
        assert late.status_code == 200
        *comments, error, end, nothing = late.text.split("\n\n")
        assert set(comments) == {":"}
        assert "waited 0.5 s for its turn" in json.loads(error.removeprefix("data: "))["error"]["message"]
        assert (end, nothing) == ("data: [DONE]", "")


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/chat_tokenize"])
@pytest.mark.parametrize("ends", ["queue_timeout", "generation_timeout", "end_all"])
def test_what_needs_no_engine_is_ended_too(path: str, ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(**({} if ends == "end_all" else {ends: 0.3})) as server:
        go_on, runtime = threading.Event(), server.server.api.runtime
        for name in ("encode", "decode"):
            monkeypatch.setattr(server.served.tokenizer, name, lambda *_, **__: go_on.wait(20))
        body = {"prompt": "a"} if path == "/tokenize" else {"tokens": [5]} if path == "/detokenize" else CHAT
        monkeypatch.setattr(tgi, "chat_tokens", lambda *_: go_on.wait(20))
        try:
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(server.post, path, body)
                if ends == "end_all":
                    assert until(lambda: runtime.unchecked == 1)
                    server.server.servers[0].get_loop().call_soon_threadsafe(runtime.end_all)
                assert answer.result(20).status_code in (503, 429)
            assert until(lambda: runtime.in_flight == 0)
        finally:
            go_on.set()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_waits_no_longer_than_it_may(stream: bool) -> None:
    with running(max_num_seqs=1, queue_timeout=0.4) as server:
        with httpx.stream("POST", server.url + "/v1/completions", json={**LONG, "stream": True}, timeout=60) as first:
            lines = first.iter_lines()
            next(lines)
            late = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "stream": stream})
            assert (late.status_code, late.headers["retry-after"]) == (503, "1")
            assert "waited 0.4 s for its turn" in late.json()["error"]["message"]
            assert next(line for line in lines if line).startswith("data: "), "its turn came: it goes on"
        assert server.idle()
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_log_probabilities_count_as_memory() -> None:
    """The next request with many of them is refused beside those that are held; others go on."""
    with running(max_queue_bytes=20_000_000) as server:
        admission = server.server.api.runtime.admission
        scored = {**LONG, "max_tokens": 2000, "logprobs": 20}
        held = [socket.create_connection(address(server), timeout=20) for _ in range(2)]
        for connection in held:
            connection.sendall(request("/v1/completions", scored))
        assert until(lambda: server.served.engine.stats().running == 2)
        assert admission.load.size > 2 * 100 * 20 * 2000
        refused = server.post("/v1/completions", scored)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200
        for connection in held:
            connection.close()
        assert until(lambda: admission.load.size == 0)
        assert server.idle()


def test_too_many_connections_are_answered() -> None:
    with running(max_connections=5, max_num_seqs=2, max_queued=2) as server:
        busy = [socket.create_connection(address(server)) for _ in range(5)]
        for connection in busy[:4]:
            connection.sendall(request("/v1/completions", LONG))
        assert until(lambda: server.server.api.runtime.in_flight == 4)
        busy[4].sendall(request("/v1/completions", LONG)[:-1])
        answer = raw(server, request("/v1/completions", {"prompt": "a", "max_tokens": 1}))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"5 connections are open" in answer
        for connection in busy:
            connection.close()
        assert until(lambda: not server.server.server_state.connections)
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", HEALTH, HEALTH[:-2], HEALTH * 2 + HEALTH[:9]], ids=range(4))
def test_idle_connections_make_room(sent: bytes) -> None:
    """Silent ones, kept-alive ones and those that owe the rest of a head; the longest idle first, never a busy one."""
    with running(max_connections=5, max_num_seqs=2, max_queued=2) as server:
        busy = socket.create_connection(address(server))
        busy.sendall(request("/v1/completions", {**LONG, "stream": True}))
        assert busy.recv(15) == b"HTTP/1.1 200 OK"
        idle = [socket.create_connection(address(server), timeout=20) for _ in range(4)]
        for connection in idle:
            connection.sendall(sent)
            said = b""
            while said.count(b"HTTP/1.1 200") < sent.count(HEALTH):
                said += connection.recv(2000)
        assert until(lambda: len(server.server.server_state.connections) == 5)
        assert server.get("/health").status_code == 200
        assert closed(idle[0])
        for connection in idle[1:]:
            connection.sendall(HEALTH[len(sent.rpartition(HEALTH)[2]) :])
            assert b"HTTP/1.1 200" in connection.recv(2000)
        while b"data: " not in busy.recv(65536):
            pass
        for connection in (busy, *idle):
            connection.close()
        assert server.idle()


def closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_slow_head_is_cut_off() -> None:
    with running(header_timeout=0.3) as server:
        assert raw(server, b"") == b""
        assert raw(server, b"POST /v1/completions HTTP/1.1\r\nHost:") == b""


def test_a_slow_body_is_cut_off() -> None:
    with running(body_timeout=0.3, header_timeout=0.3) as server:
        answer = raw(server, request("/v1/completions", LONG)[:-5])
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"did not arrive within 0.3 s" in answer
        assert server.server.api.runtime.in_flight == 0


def test_stalled_large_bodies_lock_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many large bodies as may be arriving lack their last byte: small ones go on, and of the large ones the
    stalled make room."""
    monkeypatch.setattr(limits, "MAX_LARGE", 3)
    with running(max_body_bytes=200_000) as server:
        large = request("/v1/completions", {"prompt": "a", "max_tokens": 1, "user": "x" * 150_000})
        stalled = [socket.create_connection(address(server), timeout=20) for _ in range(4)]
        for connection in stalled:
            connection.sendall(large[:-1])
        held = server.server.api.runtime.bodies
        assert until(lambda: held._held > 2 * 150_000)
        time.sleep(0.3)  # until the slow one below is quicker than these
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200
        with socket.create_connection(address(server), timeout=20) as slow:
            for place in range(0, len(large), 40_000):
                slow.sendall(large[place : place + 40_000])
                time.sleep(0.01)
            assert slow.recv(15) == b"HTTP/1.1 200 OK"
        answers = []
        for connection in stalled:
            connection.sendall(large[-1:])
            answers.append(connection.recv(65536))
            connection.close()
        assert sum(answer.startswith(b"HTTP/1.1 408 ") and b"most slowly" in answer for answer in answers) in (1, 2)
        assert sum(answer.startswith(b"HTTP/1.1 200 ") for answer in answers) in (2, 3)
        assert until(lambda: held._held == 0)
        assert server.idle()


def test_a_large_body_must_come_at_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WINDOW", 0.3)
    large = request("/v1/completions", {"prompt": "a", "max_tokens": 1, "user": "x" * 100_000})
    with running(min_body_rate=10_000) as server:
        answer = raw(server, large[:-1])
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"less than 3000 bytes" in answer
        with socket.create_connection(address(server), timeout=20) as steady:
            for place in range(0, len(large), 20_000):
                steady.sendall(large[place : place + 20_000])
                time.sleep(0.1)
            assert steady.recv(15) == b"HTTP/1.1 200 OK"


def test_half_sent_bodies_take_no_place() -> None:
    with running(max_num_seqs=1, max_queued=0) as server:
        half = request("/v1/completions", LONG)[:-5]
        senders = [socket.create_connection(address(server)) for _ in range(3)]
        for sender in senders:
            sender.sendall(half)
        time.sleep(0.1)
        assert server.get("/readyz").status_code == 200
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200
        for sender in senders:
            sender.close()


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_who_hangs_up_while_checked_leaves_its_place(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(max_num_seqs=1, max_queued=0) as server:
        checking, go_on = threading.Event(), threading.Event()
        encode = server.served.tokenizer.encode

        def slow(text: str, special: bool = True) -> list[int]:
            checking.set()
            go_on.wait(20)
            return encode(text, special)

        monkeypatch.setattr(server.served.tokenizer, "encode", slow)
        with socket.create_connection(address(server)) as connection:
            connection.sendall(request(path, LONG))
            assert checking.wait(20)
        assert until(lambda: server.server.api.runtime.in_flight == 0)
        go_on.set()
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200
        assert server.served.engine.stats().tokens_generated == 1, "nobody waited for the first request"


def test_a_hang_up_shows_behind_the_next_request(server: Running) -> None:
    with socket.create_connection(address(server)) as connection:
        connection.sendall(request("/v1/completions", LONG) + b"GET /he")
        assert until(lambda: server.served.engine.stats().running == 1)
    assert until(lambda: server.served.engine.stats().running == 0, 1.5)


def test_silent_connections_are_bounded() -> None:
    with running(max_connections=2, max_num_seqs=1, max_queued=0) as server:
        silent = [socket.create_connection(address(server)) for _ in range(90)]
        assert until(lambda: len(server.server.server_state.connections) <= 2, 5)
        for connection in silent:
            connection.close()


def test_who_does_not_read_is_cut_off() -> None:
    with running(write_timeout=0.5, max_num_seqs=8) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address(server))
        body = {**LONG, "max_tokens": 1500, "stream": True, "n": 8, "logprobs": 20, "prompt": "Once upon a time " * 20}
        connection.sendall(request("/v1/completions", body))
        assert until(lambda: server.served.engine.stats().running == 8)
        assert server.idle(60), "the engine works for nobody"


def test_a_long_generation_is_ended() -> None:
    with running(generation_timeout=0.3) as server:
        answer = server.post("/v1/completions", LONG)
        assert answer.status_code == 503
        assert "not ready after 0.3 s" in answer.json()["error"]["message"]
        lines = server.post("/v1/completions", {**LONG, "stream": True}).text.split("\n\n")
        assert "not ready after 0.3 s" in json.loads(lines[-3].removeprefix("data: "))["error"]["message"]
        assert lines[-2] == "data: [DONE]"
        assert server.idle()


def test_comments_keep_a_stream_alive() -> None:
    with (
        running(keep_alive_interval=0.05, max_num_seqs=1) as server,
        socket.create_connection(address(server)) as first,
    ):
        first.sendall(request("/v1/completions", LONG))
        assert until(lambda: server.served.engine.stats().running == 1)
        body = {"prompt": "a", "max_tokens": 2, "stream": True}
        with httpx.stream("POST", server.url + "/v1/completions", json=body) as second:
            pieces = second.iter_raw()
            assert next(pieces) == b":\n\n"
            first.close()
            assert b"".join(pieces).endswith(b"data: [DONE]\n\n")


def test_head_and_body_sizes() -> None:
    with running(max_header_bytes=4096, max_headers=20, max_body_bytes=1000) as server:
        assert server.get("/health", headers={"X-Long": "a" * 10_000}).status_code == 431
        assert server.get("/health", headers={f"X-{i}": "a" for i in range(30)}).status_code == 431
        assert server.post("/v1/completions", {"prompt": "a" * 2000}).status_code == 413
        chunked = httpx.post(
            server.url + "/generate",
            content=(b"a" * 100 for _ in range(50)),
            headers={"Content-Type": "application/json"},
        )
        assert chunked.status_code == 413
        assert chunked.json()["error_type"] == "validation"


def test_unknown_routes_and_methods(server: Running) -> None:
    assert server.get("/nope").json()["error"]["type"] == "NotFoundError"
    refused = server.get("/v1/completions")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert server.get("/v1/models/").status_code == 404
    assert server.post("/v1/embeddings", {"input": "a"}).status_code == 501


def test_request_ids(server: Running) -> None:
    assert server.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    forged = server.get("/health", headers={"X-Request-Id": "a b\tc"}).headers["x-request-id"]
    assert len(forged) == 32


def test_tls(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    with running(ssl_keyfile=key, ssl_certfile=certificate) as server:
        context = ssl.create_default_context(cafile=str(certificate))
        answer = httpx.post(server.url + "/v1/chat/completions", json=CHAT, verify=context)
        assert answer.json()["choices"][0]["message"]["content"]


def test_cors_is_off_unless_asked_for(server: Running) -> None:
    origin = {"Origin": "https://example.org"}
    assert "access-control-allow-origin" not in server.get("/v1/models", headers=origin).headers
    with running(allowed_origins=("https://example.org",), api_keys=("k",)) as open_server:
        preflight = httpx.options(
            open_server.url + "/v1/chat/completions",
            headers={**origin, "Access-Control-Request-Method": "POST"},
        )
        assert preflight.headers["access-control-allow-origin"] == "https://example.org"
        other = open_server.get("/v1/models", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        assert other.status_code == 401


def test_logs_hold_no_prompts(caplog: pytest.LogCaptureFixture) -> None:
    secret = {"messages": [{"role": "user", "content": "the word is xyzzy"}], "max_tokens": 2}
    logger = logging.getLogger("squawq.serve")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.DEBUG, "squawq"), running() as server:
            server.post("/v1/chat/completions", secret)
        records = [str(record.__dict__) for record in caplog.records]
        assert any("prompt_tokens" in record for record in records)
        assert not any("xyzzy" in record for record in records)
        with caplog.at_level(logging.DEBUG, "squawq"), running(log_requests=True) as server:
            server.post("/v1/chat/completions", secret)
        assert any("xyzzy" in str(record.__dict__) for record in caplog.records)
    finally:
        logger.removeHandler(caplog.handler)


def test_metrics_count_what_was_done() -> None:
    with running() as server:
        server.post("/v1/completions", {"prompt": "Once", "max_tokens": 5, "ignore_eos": True})
        server.post("/v1/completions", {"prompt": "Once", "top_p": 7})
        text = server.get("/metrics").text
        name = 'model_name="demo_model"'
        assert f'vllm:request_success_total{{finished_reason="length",{name}}} 1.0' in text
        assert "tgi_request_success 1.0" in text
        assert f"vllm:generation_tokens_total{{{name}}} 5.0" in text
        assert f"vllm:inter_token_latency_seconds_count{{{name}}} 4.0" in text
        assert 'tgi_request_failure{err="validation"} 1.0' in text


def test_a_stream_that_the_server_breaks_off_counts_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[object] = []
    push = CompletionCall.push

    def fail(call: CompletionCall, output: Output) -> list[dict[str, Any]]:
        outputs.append(output)
        if len(outputs) == 3:
            raise ValueError("a mistake of ours")
        return push(call, output)

    monkeypatch.setattr(CompletionCall, "push", fail)
    with running() as server:
        text = server.post("/v1/completions", {**LONG, "stream": True}).text
        assert "internal error" in text
        assert "a mistake" not in text
        assert server.idle()
        counted = 'vllm:request_success_total{finished_reason="error",model_name="demo_model"} 1.0'
        assert until(lambda: counted in server.get("/metrics").text)
