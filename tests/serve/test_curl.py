"""The model card's curl lines, as they stand but for host, port and model, against servers in processes of their own:
TGI's against `text-generation-launcher` with the card's environment, vLLM's against `squawq serve`.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import shared_data
from running import process

from squawq.demo import demo_model

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs the program curl")
# The card's environment; four processes in the place of four GPUs.
CARD = {"NUM_SHARD": "4", "QUANTIZE": "awq", "MAX_INPUT_LENGTH": "4000", "MAX_TOTAL_TOKENS": "4096"}
TGI_CHAT = """curl 0.0.0.0:8080/v1/chat/completions -X POST -H 'Content-Type: application/json' \
-d '{"model":"tgi","messages":[{"role":"system","content":"You are a helpful assistant."},\
{"role":"user","content":"What is Deep Learning?"}],"max_tokens":128}'"""
VLLM_CHAT = """curl http://localhost:8000/v1/chat/completions -X POST -H 'Content-Type: application/json' \
-d '{"model":"hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4",\
"messages":[{"role":"system","content":"You are a helpful assistant."},\
{"role":"user","content":"What is Deep Learning?"}],"max_tokens":128}'"""
GENERATE_STREAM = """curl 127.0.0.1:8080/generate_stream -X POST \
-d '{"inputs":"What is Deep Learning?","parameters":{"max_new_tokens":20}}' -H 'Content-Type: application/json'"""
GENERATE = GENERATE_STREAM.replace("generate_stream", "generate")
STREAMED_CHAT = """curl localhost:8080/v1/chat/completions -X POST -H 'Content-Type: application/json' \
-d '{"model": "tgi", "messages": [{"role": "system", "content": "You are a helpful assistant."}, \
{"role": "user", "content": "What is deep learning?"}], "stream": true, "max_tokens": 20}'"""
COMPLETION = """curl http://localhost:8000/v1/completions -H "Content-Type: application/json" \
-d '{"model": "any", "prompt": "San Francisco is a", "max_tokens": 7, "temperature": 0}'"""


@pytest.fixture(scope="module")
def launched() -> Iterator[str]:
    environment = {**CARD, "MODEL_ID": str(demo_model()), "QUANTIZE": "", "HOSTNAME": "127.0.0.1"}
    with process(["--port", "0"], environment, module="squawq.serve.tgi_launcher") as (_, url):
        yield url


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    with process(["serve", str(demo_model()), "--port", "0", "--max-model-len", "4096"]) as (_, url):
        yield url


def curl(line: str, url: str, *options: str) -> str:
    """What a line prints, its address put in the place of ours."""
    program, address, *rest = shlex.split(line)
    _, _, path = address.removeprefix("http://").partition("/")
    command = [program, f"{url}/{path}", *rest, "--silent", "--show-error", "--max-time", "60", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def events(text: str) -> list[Any]:
    """The events of a stream; each is one line and an empty one."""
    *lines, last = text.split("\n\n")
    assert last == ""
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def check_chat(answer: dict[str, Any], model: str) -> None:
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert answer["model"] == model
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] in ("stop", "length")
    assert 0 < answer["usage"]["completion_tokens"] <= 128


def test_tgis_chat(launched: str) -> None:
    check_chat(json.loads(curl(TGI_CHAT, launched)), "demo_model")


def test_the_cards_environment(tmp_path: Path) -> None:
    """An AWQ model, as the card's is; this one needs a chat template and room for as many tokens."""
    folder = shutil.copytree(shared_data("autoawq-babyllama"), tmp_path / "model", copy_function=shutil.copyfile)
    folder.chmod(0o755)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    with process(["--port", "0"], {**CARD, "MODEL_ID": str(folder)}, module="squawq.serve.tgi_launcher") as (_, url):
        check_chat(json.loads(curl(TGI_CHAT, url)), "model")
        assert json.loads(curl("curl x/info", url))["max_input_tokens"] == 4000


def test_vllms_chat(served: str) -> None:
    check_chat(json.loads(curl(VLLM_CHAT, served)), "demo_model")


def test_either_line_works_on_either_server(launched: str, served: str) -> None:
    asked = "hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4"
    check_chat(json.loads(curl(VLLM_CHAT, launched)), asked)  # TGI says the name that was asked for
    check_chat(json.loads(curl(TGI_CHAT, served)), "demo_model")


def test_generate(launched: str, served: str) -> None:
    texts = {url: json.loads(curl(GENERATE, url))["generated_text"] for url in (launched, served)}
    assert texts[launched] == texts[served] != ""
    for url, text in texts.items():
        found = events(curl(GENERATE_STREAM, url))
        assert found[-1]["generated_text"] == text
        assert "".join(event["token"]["text"] for event in found if not event["token"]["special"]) == text
        assert [event["index"] for event in found] == list(range(1, len(found) + 1))


def test_a_streamed_chat(launched: str, served: str) -> None:
    for url in (launched, served):
        *chunks, last = events(curl(STREAMED_CHAT, url))
        assert last == "[DONE]"
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")


def test_a_completion(launched: str, served: str) -> None:
    texts = [json.loads(curl(COMPLETION, url))["choices"][0]["text"] for url in (launched, served)]
    assert texts[0] == texts[1] != ""


def test_the_status_and_the_headers(launched: str, served: str) -> None:
    bad = GENERATE.replace('"max_new_tokens":20', '"max_new_tokens":0')
    head, body = curl(bad, launched, "--include").split("\n\n")
    assert head.startswith("HTTP/1.1 422 ")
    error = "Input validation error: `max_new_tokens` must be strictly positive"
    assert json.loads(body) == {"error": error, "error_type": "validation"}
    assert curl("curl x/health", served, "--include").startswith("HTTP/1.1 200 ")
    assert json.loads(curl("curl x/info", launched))["max_input_tokens"] == 4000
    plain = TGI_CHAT.replace("-H 'Content-Type: application/json'", "")  # curl then sends a form
    assert json.loads(curl(plain, served))["error"]["code"] == 415
