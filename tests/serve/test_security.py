"""Known attacks on servers of this kind, by what a request asks for: counts, templates, grammars, media, code, tokens.

A test names the advisories of its attack. Attacks on connections are test_wire.py's, generated ones test_hostile.py's.
"""

from __future__ import annotations

import ast
import json
import shutil
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from running import MESSAGES, process, running
from wire import CHAT, COMPLETION, GENERATE, MEGABYTE, Attacked, Wire, attacked

import squawq
from squawq.cli import main
from squawq.demo import demo_model

SOURCE = Path(squawq.__file__).parent
TEMPLATE_ROUTES = ("/v1/chat/completions", "/chat_tokenize", "/invocations", "/tokenize")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with attacked(tmp_path_factory.mktemp("home")) as found:
        yield found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model, to be made hostile."""
    return Path(shutil.copytree(demo_model(), tmp_path / "model", copy_function=shutil.copyfile))


COUNTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {**CHAT, "n": 10**9}),
    ("/v1/completions", {**COMPLETION, "n": 10**9}),
    ("/v1/completions", {**COMPLETION, "best_of": 10**9}),
    ("/v1/completions", {**COMPLETION, "n": 10**9, "best_of": 10**9, "stream": True}),
    ("/v1/completions", {**COMPLETION, "prompt": ["a"] * 200_000}),
    ("/v1/completions", {**COMPLETION, "prompt": ["a"] * 256, "n": 64}),
    ("/v1/completions", {**COMPLETION, "logprobs": 10**9}),
    ("/v1/completions", {**COMPLETION, "prompt_logprobs": 10**9}),
    ("/v1/completions", {**COMPLETION, "max_tokens": 10**9}),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 10**9}),
    ("/v1/chat/completions", {**CHAT, "stop": ["x"] * 100_000}),
    ("/generate", {"inputs": "a", "parameters": {"best_of": 10**9, "do_sample": True}}),
    ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 10**9}}),
    ("/generate", {"inputs": "a", "parameters": {"top_n_tokens": 10**9}}),
]


def test_unbounded_n_and_best_of(target: Attacked) -> None:
    """CVE-2026-34756 (GHSA-3mwp-wvh9-7528), best_of in vLLM <= 0.5: a count allocates nothing before it is checked."""
    assert target.lives()
    before = target.forget_peak()
    for _ in range(3):
        for path, body in COUNTS:
            reply = target.post(path, body)
            assert reply.refused, (path, str(body)[:100], reply.status)
    assert target.resident(peak=True) - before < 64 * MEGABYTE
    assert target.lives()


WRONG = [  # where @ stands, as many wrong entries as a body can hold
    ("/v1/completions", '{"prompt":["a"@]}', "1"),
    ("/v1/completions", '{"prompt":[1@]}', "-1"),
    ("/v1/completions", '{"prompt":[[1]@]}', "[]"),
    ("/v1/completions", '{"prompt":"a","allowed_token_ids":[-1@]}', "-1"),
    ("/v1/chat/completions", '{"messages":[{}@]}', "{}"),
    ("/v1/chat/completions", '{"messages":[{"role":"user","content":[1@]}]}', "1"),
    ("/v1/chat/completions", '{"messages":[{"role":"assistant","tool_calls":[1@]}]}', "1"),
    ("/v1/chat/completions", '{"messages":[],"tools":[{}@]}', "{}"),
    ("/v1/chat/completions", '{"messages":[],"stop":[1@]}', "1"),
    ("/v1/chat/completions", '{"messages":[]@}', '"":1'),
    ("/v1/chat/completions", '{"messages":[{"role":"user"@}]}', '"":1'),
    ("/v1/chat/completions", '{"messages":[],"metadata":{"a":1@}}', '"":1'),
    ("/v1/chat/completions", '{"messages":[],"logit_bias":{"a":""@}}', '"":""'),
    ("/generate", '{"inputs":"a","parameters":{"stop":[1@]}}', "1"),
    ("/detokenize", '{"tokens":[-1@]}', "-1"),
]


def test_error_echo_amplification(target: Attacked) -> None:
    """vLLM's error echo (5,300 times the request): a refusal is short, and telling it takes little memory."""
    for path, body, entry in WRONG:
        count = 1_200_000 // (len(entry) + (7 if entry[0] == '"' else 1))
        entries = "".join(f',"{i}{entry[1:]}' for i in range(count)) if entry[0] == '"' else f",{entry}" * count
        before = target.forget_peak()
        reply = target.wire.post(path, body.replace("@", entries).encode())
        assert reply.status in (400, 422), (path, body, reply.status)
        assert len(reply.body) < 4096, (path, body)
        assert target.resident(peak=True) - before < 64 * MEGABYTE, (path, body)


@pytest.mark.parametrize("path", TEMPLATE_ROUTES)
def test_chat_template_in_request(target: Attacked, path: str) -> None:
    """GHSA-542m-9234-8gvf, CVE-2026-115911, CVE-2026-115918, PYSEC-2026-2013, GHSA-69j4-grxj-j64p: no request brings a
    template, or sets by chat_template_kwargs what the server sets."""
    endless = "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}"
    asked: list[dict[str, Any]] = [{"chat_template": endless}]
    for name in ("chat_template", "tokenize", "messages", "tools", "add_generation_prompt"):
        asked.append({"chat_template_kwargs": {name: endless}})
        asked.append({"chat_template_kwargs": {name: True}})
    for fields in asked:
        reply = target.post(path, {"messages": MESSAGES, **fields})
        assert reply.refused, (fields, reply.status)
        assert b"chat_template" in reply.body
    assert target.lives()


def test_a_long_text_holds_nobody_up(target: Attacked) -> None:
    """CVE-2026-115911's cost by another way: others are answered while 2 MB of text are tokenized."""
    text = "a" * 1_900_000
    with ThreadPoolExecutor(1) as pool, Wire(target.url) as other:
        long = pool.submit(target.post, "/v1/completions", {**COMPLETION, "prompt": text, "truncate_prompt_tokens": 5})
        waits = [0.0]
        while not long.done():
            health = other.ask("GET", "/health")
            assert health.status == 200
            waits.append(health.seconds)
        assert long.result().status == 200
        assert max(waits) < long.result().seconds / 2
    assert target.post("/v1/completions", {**COMPLETION, "prompt": text}).refused  # which no truncation shortens
    assert target.post("/tokenize", {"inputs": text}).refused  # a list of its tokens would be a hundred times as long
    assert target.post("/tokenize", {"prompt": text, "return_token_strs": True}).refused
    assert target.post("/chat_tokenize", {"messages": [{"role": "user", "content": text}]}).refused


HOSTILE = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{% for i in range(10**8) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
    "{% include '/etc/passwd' %}",
    "{{ '\\ud800' }}",
    "{% if %}",
]


@pytest.mark.parametrize("template", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_template_in_a_model(model: Path, template: str) -> None:
    """CVE-2026-115911 by way of a downloaded model: its template holds neither the event loop nor other requests."""
    (model / "chat_template.jinja").write_text(template)
    with running(model=str(model), template_timeout=1) as server, ThreadPoolExecutor(2) as pool:
        chats = [pool.submit(server.post, "/v1/chat/completions", CHAT) for _ in range(2)]
        assert server.get("/health").status_code == 200
        assert server.post("/v1/completions", COMPLETION).status_code == 200
        replies = [chat.result() for chat in chats]
        assert all(reply.status_code in (400, 503) and len(reply.content) < 4096 for reply in replies), replies
        assert 400 in [reply.status_code for reply in replies]
        assert server.post("/v1/completions", COMPLETION).status_code == 200
        assert server.idle()


def _schema(schema: object) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def _tool(parameters: object) -> dict[str, Any]:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    return {"tools": [tool], "tool_choice": "required"}


PATTERNS = ["(", "[", "(?=a)", "(a", r"\1", "*", "a{9999999999}", "((a*)*)*b", "(?<x>a)", "\\", "[z-a]", "(?P<", "\x00"]
SCHEMAS: list[object] = [
    {"type": "string", "pattern": pattern} for pattern in PATTERNS
] + [
    {"type": "unknown"},
    {"type": 7},
    {"type": "array", "items": 7},
    {"properties": {"a": {"$ref": "#/nowhere"}}},
    {"$ref": "#"},
    {"properties": []},
    {"enum": {}},
    {"type": "object", "required": "a"},
    {"minimum": "1", "type": "integer"},
    [],
    "{",
    None,
    7,
]  # fmt: skip


def test_bad_regexes_schemas_and_tools(target: Attacked) -> None:
    """CVE-2025-71379, PYSEC-2025-54, CVE-2025-48943, CVE-2025-48942, CVE-2025-48944: a pattern, schema or tool that
    cannot be compiled is the request's failure, not the server's."""
    bodies: list[tuple[str, dict[str, Any]]] = []
    for pattern in PATTERNS:
        bodies.append(("/v1/completions", {**COMPLETION, "structured_outputs": {"regex": pattern}}))
        bodies.append(("/generate", {"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": pattern}}}))
    for schema in SCHEMAS:
        bodies += [("/v1/chat/completions", {**CHAT, **form}) for form in (_schema(schema), _tool(schema))]
        bodies.append(("/v1/completions", {**COMPLETION, "structured_outputs": {"json": schema}}))
        bodies.append(("/generate", {"inputs": "a", "parameters": {"grammar": {"type": "json", "value": schema}}}))
    for path, body in bodies:
        body.setdefault("parameters", {}).setdefault("max_new_tokens", 1) if "inputs" in body else None
        reply = target.post(path, body)
        assert reply.status == 200 or reply.refused, (path, body, reply)
    for pattern in ("(", "[z-a]", r"\1"):
        assert target.post("/v1/completions", {**COMPLETION, "structured_outputs": {"regex": pattern}}).status == 400
        assert target.post("/v1/chat/completions", {**CHAT, **_tool({"pattern": pattern, "type": "string"})}).refused
    assert target.lives()


def test_grammar_cache_is_bounded(target: Attacked) -> None:
    """GHSA-hf3c-wxg2-49q9 (memory), CVE-2025-29770 (disk): what was compiled is forgotten, and never written."""
    held = []
    for number in range(200):
        schema = {"type": "object", "properties": {f"p{number}": {"type": "integer"}, "q": {"enum": ["x" * 500]}}}
        assert target.post("/v1/chat/completions", {**CHAT, **_schema(schema)}).status == 200
        if number in (49, 199):
            held.append(target.resident())
    assert held[1] - held[0] < 48 * MEGABYTE
    assert target.processes() < 80
    assert not list(target.home.rglob("*"))


def test_media_is_never_fetched(target: Attacked, tmp_path: Path) -> None:
    """CVE-2026-24779, CVE-2026-25960, CVE-2026-34753, CVE-2026-0599, CVE-2026-33626, CVE-2026-100650, CVE-2026-5497: a
    URL is text. Parts that are not text are refused."""
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        urls = [f"http://127.0.0.1:{listener.getsockname()[1]}/x.png", secret.as_uri(), "data:image/png;base64,AAAA"]
        for url in urls:
            text = f"![]({url}) <img src='{url}'> {url}"
            parts = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "image_url", "image_url": url},
                {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
                {"type": "video_url", "video_url": {"url": url}},
                {"type": "file", "file": {"file_data": url}},
                {"type": "text", "text": "a", "image_url": {"url": url}, "text_url": url},
            ]
            for part in parts[:-1]:
                for role in ("user", "system", "assistant", "tool"):
                    body = {**CHAT, "messages": [{"role": role, "content": [{"type": "text", "text": "a"}, part]}]}
                    assert target.post("/v1/chat/completions", body).refused, part
            messages = [{"role": "user", "content": [{"type": "text", "text": text}, parts[-1]]}]
            bodies: list[tuple[str, dict[str, Any]]] = [
                ("/v1/chat/completions", {**CHAT, "messages": messages, "model": url, "user": url}),
                ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"image": url}}),
                ("/v1/chat/completions", {**CHAT, **_tool({"properties": {"a": {"$ref": url}}})}),
                ("/v1/chat/completions", {**CHAT, **_schema({"$ref": url, "$schema": url, "$id": url})}),
                ("/v1/completions", {**COMPLETION, "prompt": text}),
                ("/generate", {**GENERATE, "inputs": text}),
                ("/tokenize", {"inputs": text}),
                ("/invocations", {**GENERATE, "inputs": text}),
            ]
            for path, body in bodies:
                reply = target.post(path, body)
                assert reply.status == 200 or reply.refused, (path, body)
                assert b"the secret" not in reply.body
        with pytest.raises(BlockingIOError):
            listener.accept()


IMPORTS = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing", "zmq", "code"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "numpy.load", "np.load", "os.system", "os.popen"}
UNSAFE = {"shell", "trust_remote_code", "allow_pickle"}


def _dangers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] in IMPORTS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in IMPORTS:
            yield str(node.module)
        elif isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in CALLS:
            yield name
        elif isinstance(node, ast.keyword) and node.arg in UNSAFE and ast.unparse(node.value) != "False":
            yield str(node.arg)


def test_no_pickle_and_no_code_from_data(model: Path) -> None:
    """CVE-2025-32444, -29783, -47277, -30165, -62164, CVE-2024-9053, -11041, CVE-2026-3059, -3060, -7304, -14890,
    -15969, -86793, -93034, -93088, CVE-2025-59953, -66455: nothing that is read can become code."""
    found = {file.name: [*_dangers(ast.parse(file.read_text()))] for file in SOURCE.rglob("*.py")}
    assert len(found) > 50
    spawning = found.pop("local_ranks.py")  # a command's own arguments, to processes that it starts
    assert {name.partition(".")[0] for name in spawning} == {"multiprocessing"}
    assert {name: dangers for name, dangers in found.items() if dangers} == {}
    assert len([*_dangers(ast.parse("import pickle, os\nfrom marshal import loads\neval('1')\ntorch.load(x)"))]) == 4
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert main(["serve", str(model), "--port", "0"]) == 2


def test_trust_remote_code(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CVE-2026-27893, CVE-2026-22807 (auto_map): code in a model's folder is not looked at and cannot be asked for."""
    mark = tmp_path / "was_run"
    code = f"open({str(mark)!r}, 'w').write('x')\n"
    files = ("modeling_x", "configuration_x", "tokenization_x", "__init__", "custom_generate/generate", "sitecustomize")
    (model / "custom_generate").mkdir()
    for name in files:
        (model / f"{name}.py").write_text(code)
    names = {
        "AutoConfig": "configuration_x.X",
        "AutoModelForCausalLM": "modeling_x.X",
        "AutoTokenizer": "tokenization_x.X",
    }
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**settings, "auto_map": names, "trust_remote_code": True}))
    with running(model=str(model)) as server:
        assert server.post("/v1/chat/completions", CHAT).status_code == 200
    assert not mark.exists()
    assert not [name for name in sys.modules if name.endswith("modeling_x")]
    with process(["serve", str(model), "--port", "0", "--trust-remote-code"]) as (_, url):
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60).status_code == 200
    assert not mark.exists()
