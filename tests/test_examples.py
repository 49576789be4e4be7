"""Every script of examples/ on the demo model, in a process of its own, with no network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import programs
import pytest
from safetensors.torch import save_file

from squawq.demo import demo_model
from squawq.format.reader import Checkpoint

if TYPE_CHECKING:
    from running import Running

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
CLIENTS = {"chat_openai.py": "/v1", "chat_inference_client.py": ""}
GENERATORS = {"generate_awq.py", "generate_transformers.py"}


def run(name: str, *arguments: object) -> str:
    """What a script prints; it must end well."""
    command = [str(EXAMPLES / name), *map(str, arguments)]
    if name.endswith(".sh"):
        done = subprocess.run(["sh", *command], capture_output=True, text=True)
    else:
        done = programs.run(command, env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"})  # nobody
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_script_is_forgotten() -> None:
    assert {*CLIENTS, *GENERATORS, "quantize_awq.py", "chat_curl.sh"} == SCRIPTS
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"examples/{name}" in readme for name in SCRIPTS)


def test_quantize(tmp_path: Path) -> None:
    """On the demo model's first layer: the script takes the whole calibration set."""
    model = tmp_path / "model"
    shutil.copytree(demo_model(), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    for path in model.glob("*.safetensors*"):
        path.unlink()
    source = Checkpoint(demo_model())
    deeper = re.compile(r"model\.layers\.[1-9]")
    tensors = {name: source.read(name) for name in source.tensors if not deeper.match(name)}
    save_file(tensors, model / "model.safetensors")
    assert run("quantize_awq.py", model, tmp_path / "out").endswith("is ready\n")
    quant = Checkpoint(tmp_path / "out").config.quant
    assert quant is not None
    assert (quant.bits, quant.group_size, quant.zero_point) == (4, 128, True)
    assert "kept" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_generate(awq_demo: Path, name: str) -> None:
    assert len(run(name, awq_demo).split()) > 20


@pytest.mark.parametrize("name", sorted(CLIENTS))
def test_clients(server: Running, name: str) -> None:
    assert len(run(name, server.url + CLIENTS[name]).split()) > 20


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs the program curl")
def test_curl(tgi_server: Running) -> None:
    answer = json.loads(run("chat_curl.sh", tgi_server.url))
    assert len(answer["choices"][0]["message"]["content"].split()) > 20
