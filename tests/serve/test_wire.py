"""Known attacks on the way a server reads its connections: large and slow requests, ambiguous ones, keys, labels.

A test names the advisories of its attack. What requests ask for is test_security.py's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from running import Running, running
from wire import COMPLETION, MEGABYTE, Wire, attacked, talk

POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
BODY = json.dumps(COMPLETION).encode()
KEYS = ("first-key", "second-key")
PUBLIC = ("/", "/health", "/livez", "/readyz", "/ping")


@pytest.fixture(scope="module")
def hasty() -> Iterator[Running]:
    """A server that does not wait long."""
    with running(header_timeout=1, body_timeout=1, idle_timeout=1) as found:
        yield found


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    with running(api_keys=KEYS) as found:
        yield found


MEGA = b"a" * MEGABYTE
LARGE: dict[str, tuple[int, Iterable[bytes]]] = {  # 64 MB each, and the status that they end with
    "header": (431, chain([b"GET /health HTTP/1.1\r\nHost: a\r\nX-Large: "], repeat(MEGA, 64))),
    "headers": (431, chain([b"GET /health HTTP/1.1\r\nHost: a\r\n"], repeat(b"X: y\r\n" * (MEGABYTE // 6), 64))),
    "target": (431, chain([b"GET /"], repeat(MEGA, 64))),
    "body": (413, chain([POST, b"Content-Length: 67108864\r\n\r\n"], repeat(MEGA, 64))),
    "chunks": (413, chain([POST, b"Transfer-Encoding: chunked\r\n\r\n"], repeat(b"100000\r\n" + MEGA + b"\r\n", 64))),
    "chunk": (413, chain([POST, b"Transfer-Encoding: chunked\r\n\r\n4000000\r\n"], repeat(MEGA, 64))),
    "extension": (431, chain([POST, b"Transfer-Encoding: chunked\r\n\r\n5;"], repeat(MEGA, 64))),
    "trailer": (431, chain([POST, b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: "], repeat(MEGA, 64))),
}


def test_huge_headers_and_bodies(tmp_path: Path) -> None:
    """CVE-2025-48956: 64 MB of header or body are refused in few words, without being held."""
    with attacked(tmp_path) as target:
        assert target.lives()
        for name, (status, pieces) in LARGE.items():
            before = target.forget_peak()
            reply = target.wire.send(pieces)
            target.wire.close()
            assert reply.status == status, name
            assert len(reply.body) < 4096, name
            assert target.resident(peak=True) - before < 24 * MEGABYTE, name
        many = target.wire.ask("GET", "/health", headers={f"x-{i}": "y" for i in range(1000)})
        assert many.status == 431
        assert target.lives()


SLOW = {
    "nothing": [],
    "head": [b"GET /health HTTP/1.1\r\nX: "],
    "line": [b"GET /"],
    "body": [POST, b"Content-Length: 100000\r\n\r\n"],
    "chunks": [POST, b"Transfer-Encoding: chunked\r\n\r\nfffff\r\n"],
    "unread body": [b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"],
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_senders_are_cut_off(hasty: Running, name: str) -> None:
    """CVE-2025-48956's other half: a request that comes byte by byte does not hold its connection for ever."""
    said = talk(hasty.url, chain(SLOW[name], repeat(b"a", 1000 if SLOW[name] else 0)), pause=0.1)
    expected = {"body": b" 408 ", "chunks": b" 408 ", "unread body": b" 501 "}.get(name, b"")
    assert said.partition(b"\r\n")[0].startswith(b"HTTP/1.1" + expected if expected else b"")
    assert bool(said) == bool(expected)
    assert hasty.idle()


SMUGGLED = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"
LENGTH, ENCODING = b"Content-Length: ", b"Transfer-Encoding: "
CHUNKED = ENCODING + b"chunked\r\n"
CHUNK = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
LENGTHS = (b"-5", b"+5", b"0x5", b"5_0", b"5 5", b"5.0", b"1e2", b"", b"9" * 30, "٣".encode(), b"5;a")
ENCODINGS = (b"gzip, chunked", b"chunked, chunked", b"identity", b"xchunked", b"chunked;a", b"\x0bchunked", b"")
SIZES = (b"zz", b"-5", b"+5", b"0x5", b" 5", b"5 5", b"f" * 40, b"", b"1", b"5;\x00")
AMBIGUOUS = {
    **{f"length {v!r}": POST + LENGTH + v + b"\r\n\r\n" + BODY + SMUGGLED for v in LENGTHS},
    **{f"encoding {v!r}": POST + ENCODING + v + b"\r\n\r\n" + CHUNK + SMUGGLED for v in ENCODINGS},
    **{f"chunk {v!r}": POST + CHUNKED + b"\r\n" + v + b"\r\n" + BODY + b"\r\n0\r\n\r\n" + SMUGGLED for v in SIZES},
    "both": POST + LENGTH + b"6\r\n" + CHUNKED + b"\r\n" + CHUNK + SMUGGLED,
    "both, other order": POST + CHUNKED + LENGTH + b"6\r\n\r\n" + CHUNK + SMUGGLED,
    "two lengths": POST + LENGTH + b"5\r\n" + LENGTH + b"%d\r\n\r\n" % len(BODY) + BODY + SMUGGLED,
    "two lengths in one": POST + LENGTH + b"5, %d\r\n\r\n" % len(BODY) + BODY + SMUGGLED,
    "two encodings": POST + CHUNKED + b"Transfer-Encoding: identity\r\n\r\n" + CHUNK + SMUGGLED,
    "space before colon": POST + b"Transfer-Encoding : chunked\r\n\r\n" + CHUNK + SMUGGLED,
    "encoding in HTTP/1.0": POST.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n" + CHUNK + SMUGGLED,
    "first header folded": b"GET /health HTTP/1.1\r\n Host: a\r\n\r\n" + SMUGGLED,
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/3.0": b"GET /health HTTP/3.0\r\nHost: a\r\n\r\n",
    "HTTP/1.1 and NUL": b"GET /health HTTP/1.1\x00\r\nHost: a\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "NUL in a header": b"GET /health HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
    "bare CR in a header": b"GET /health HTTP/1.1\r\nHost: a\r\nX: a\rY: b\r\n\r\n",
    "no colon": b"GET /health HTTP/1.1\r\nHost: a\r\nX\r\n\r\n",
    "no name": b"GET /health HTTP/1.1\r\nHost: a\r\n: x\r\n\r\n",
    "space in target": b"GET /health x HTTP/1.1\r\nHost: a\r\n\r\n",
    "no target": b"GET  HTTP/1.1\r\nHost: a\r\n\r\n",
    "no method": b" /health HTTP/1.1\r\nHost: a\r\n\r\n",
    "control in target": b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
    "TLS": bytes.fromhex("16030100a5010000a10303") + bytes(160),
    "noise": bytes(range(256)) * 8,
    "empty lines": b"\r\n" * 50_000,
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_request_smuggling(hasty: Running, name: str) -> None:
    """What two readers could take for different requests is refused, and what follows it is not read."""
    said = talk(hasty.url, [AMBIGUOUS[name]])
    assert said.count(b"HTTP/1.1 ") <= 1
    assert said == b"" or said.startswith(b"HTTP/1.1 4")
    assert hasty.get("/health").status_code == 200
    assert hasty.idle()


ODD_TARGETS = [
    "//v1/models", "/v1/../health", "/health/../v1/models", "/health/..%2fv1/models", "/%2e%2e/", "/%2e%2e/v1/models",
    "/./v1/models", "/v1/models/", "/v1/models?x=/health", "/v1/models;/health", "/v1/models%3f/health",
    "/V1/MODELS", "/v1%2fmodels", "/v1/models%00", "/v1/models%0a", "/v1/models#/health", "/health/", "//health",
    "/HEALTH", "/health%0a", "/health%00", "/health;/v1/models", "/health%3f", "/%68ealth/../v1/models", "/\\health",
    "http://a/v1/models", "http://a/health", "http://a//v1/models", "http://health@a/v1/models", "*",
    "https://a/livez/../info", "a", "health", "@/health", ":80/health", "/openapi.json", "/info/health",
    "/metrics/../health", "/ping/metrics",
]  # fmt: skip
ODD_HEADERS = [
    {"host": "a/health"}, {"host": "a/health?"}, {"host": "a/health#"}, {"host": "a@b/health/.."}, {"host": "/health"},
    {"x-original-url": "/health"}, {"x-rewrite-url": "/health"}, {"x-forwarded-prefix": "/health"},
    {"x-http-method-override": "GET"}, {"x-forwarded-for": "127.0.0.1"}, {"forwarded": "for=127.0.0.1;host=a/health"},
    {"authorization": "Bearer"}, {"authorization": "Bearer "}, {"authorization": KEYS[0]}, {"authorization": ""},
    {"authorization": f"Basic {KEYS[0]}"}, {"authorization": f"Bearer {KEYS[0].upper()}"},
    {"authorization": f"Bearer {KEYS[0][:-1]}"}, {"authorization": f"Bearer {KEYS[0]}x"},
    {"authorization": f"Bearer {KEYS[0]} {KEYS[1]}"}, {"authorization": f"Bearer {KEYS[0]}, Bearer {KEYS[1]}"},
    {"authorization": "Bearer \xff\xfe"}, {"authorization": "Bearer " + "a" * 9000}, {"x-api-key": KEYS[0]},
    {"authorization": f"Bearer{KEYS[0]}"}, {"cookie": f"authorization=Bearer {KEYS[0]}"}, {"api-key": KEYS[0]},
    {"authorization": "Bearer wrong\r\nauthorization: Bearer " + KEYS[0]},
    {"authorization": f"Bearer {KEYS[0]}\r\nauthorization: Bearer wrong"},
    {"authorization": f"Bearer {KEYS[0]}\r\nAuthorization: Bearer {KEYS[0]}"},
]  # fmt: skip


def routes(server: Running) -> list[tuple[str, str]]:
    """Every method and path that the server says it has."""
    paths = server.get("/openapi.json", headers={"authorization": f"Bearer {KEYS[0]}"}).json()["paths"]
    found = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    assert ("POST", "/v1/completions") in found
    return found


def test_a_key_guards_every_route(guarded: Running) -> None:
    """CVE-2025-59425 and vLLM's open /invocations: every route but those for health asks for a key; keys are compared
    whole, in their case, by their hashes."""
    with Wire(guarded.url) as wire:
        for method, path in routes(guarded):
            known = {wire.ask(method, path, headers={"authorization": f"Bearer {key}"}).status for key in KEYS}
            assert 401 not in known
            for headers in ({}, {"authorization": "Bearer wrong"}):
                status = wire.ask(method, path, headers=headers).status
                assert (status == 401) != ((method, path) in [("GET", public) for public in PUBLIC]), (method, path)
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get", "QUERY"):
            assert all(wire.ask(method, path).status == 401 for path in PUBLIC), method
        assert all(wire.ask("HEAD", path).status == 200 for path in PUBLIC)


def test_no_way_around_the_key(guarded: Running) -> None:
    """CVE-2026-48746 (Starlette X41-2026-002), CVE-2026-49468: no odd target, no Host header opens a route."""
    with Wire(guarded.url) as wire:
        for target in ODD_TARGETS:
            for method in ("GET", "POST", "HEAD"):
                reply = wire.ask(method, target)
                assert reply.status in (400, 401), (method, target, reply)
                assert reply.headers.get("www-authenticate") == "Bearer" or reply.status == 400
        for headers in ODD_HEADERS:
            for path in ("/v1/models", "/metrics", "/nowhere"):
                assert wire.ask("GET", path, headers=headers).status in (400, 401), headers
        public = wire.ask("GET", "/health?/v1/models", headers={"x-original-url": "/v1/models"})
        assert (public.status, public.body) == (200, b"")


def series(server: Running) -> set[tuple[str, ...]]:
    """Every series of the metrics, by name and labels."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    return {(sample.name, *map(str, sample.labels.items())) for family in families for sample in family.samples}


def test_metrics_labels_are_fixed(hasty: Running) -> None:
    """PYSEC-2026-4325: no method, path, header or model name becomes a label."""

    def attack(numbers: Iterable[int]) -> None:
        with Wire(hasty.url) as wire:
            for i in numbers:
                wire.ask(f"METHOD{i}", "/health")
                wire.ask("GET", f"/path{i}?query={i}", headers={"x-request-id": f"id{i}", "user-agent": f"agent{i}"})
                wire.ask("POST", f"/v1/models/name{i}", headers={"content-type": f"application/x-{i}"})
                wire.post("/v1/completions", json.dumps({**COMPLETION, "model": f"model{i}", "user": f"u{i}"}).encode())
                wire.post("/v1/completions", json.dumps({f"field{i}": i}).encode())
            talk(hasty.url, [b"GET / HTTP/1.%d\r\n\r\n" % i])

    attack(range(2))
    series(hasty)
    before = series(hasty)
    attack(range(2, 40))
    assert series(hasty) == before
    assert len(before) < 2000
