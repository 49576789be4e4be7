"""Shell blocks on README.md and docs/: each command is run here, unless a note below its block says that it is not.

MODEL is a small 16-bit model, OUT its AWQ folder, ports 8000 and 8080 stand for a server and one in TGI's dialect. A
command is run once, however many pages have it. Lines with pip are not run. Of all blocks, the options are checked.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import programs
import pytest
import yaml
from pages import BLOCKS, ROOT
from running import process
from typer.testing import CliRunner

from squawq.cli import app
from squawq.export.run import export
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize
from squawq.serve.tgi_launcher import app as launcher

if TYPE_CHECKING:
    from running import Running

SHELL = [block for block in BLOCKS if block.language == "sh"]
LINES = [(block, command) for block in SHELL for command in block.commands()]
RUN = dict.fromkeys(
    " ".join(shlex.quote(word) for word in shlex.split(command, comments=True))
    for block, command in LINES
    if block.runs
)
SERVERS = {"localhost:8000": "server", "localhost:8080": "tgi_server"}  # fixtures
LAUNCHERS = {"squawq": "squawq", "text-generation-launcher": "squawq.serve.tgi_launcher"}


@pytest.fixture(scope="session")
def awq_small(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model rounded to nearest, with a context of 4,096 tokens."""
    folder = tmp_path_factory.mktemp("docs") / "OUT"
    quantize(small, folder, QuantConfig(method="rtn"))
    config = folder / "config.json"
    config.write_text(re.sub(r'("max_position_embeddings": )\d+', r"\g<1>4096", config.read_text()))
    return folder


def makes(words: list[str], name: str) -> bool:
    return words[:2] in (["squawq", "quantize"], ["squawq", "export"]) and words[3] == name


def split(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The variables that precede a command, and its words."""
    count = next(index for index, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", RUN)
def test_command(command: str, small: Path, awq_small: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    variables, words = split(shlex.split(command))
    shutil.copytree(small, tmp_path / "MODEL")
    if not makes(words, "OUT"):
        shutil.copytree(awq_small, tmp_path / "OUT")
    if words[:3] == ["squawq", "export", "OUT-gptq"]:
        export(tmp_path / "OUT", tmp_path / "OUT-gptq", "gptq")
    (tmp_path / "my.txt").write_text(
        "One document about dogs and cats.\n=====\nAnother one about cats and dogs.\n" * 40
    )
    environment = {**os.environ, **variables, "HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody
    if words[0] == "pip":
        return
    if words[0] == "curl":
        asked = next(server for server in SERVERS if any(server in word for word in words))
        server: Running = request.getfixturevalue(SERVERS[asked])
        words = ["curl", "-sS", "--fail", *(word.replace(asked, server.url) for word in words[1:])]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout or "readyz" in command
    elif words[:2] == ["squawq", "serve"] or words[0] == "text-generation-launcher":
        given = [str(tmp_path / word) if word == "OUT" else word for word in words[1:]]
        given += ["--port", "0"]
        here = {key: str(tmp_path / value) if value == "OUT" else value for key, value in variables.items()}
        with process(given, here, module=LAUNCHERS[words[0]]) as (_, url):
            assert url.startswith("http://")
    else:
        assert words[0] == "squawq", f"the tests cannot run {command!r}: write a note below its block"
        ran = programs.run(["-m", *words], env=environment, cwd=tmp_path, stdin="Hello!\n")
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout


def test_notes_are_needed() -> None:
    """Of what the tests could run, only what the network or a long time would be needed for has a note."""
    for block, command in LINES:
        _, words = split(shlex.split(command, comments=True))
        if not block.runs and words[0] == "curl":
            raise AssertionError(command)
    assert len(RUN) >= 20


def in_a_container(words: list[str]) -> list[str]:
    """The command line that a container runs, by deploy/entrypoint.sh; of `docker build` nothing."""
    if not (images := [index for index, word in enumerate(words) if word.startswith("squawq:")]):
        return []  # somebody else's image
    image = images[0]
    file = (ROOT / "deploy" / "Dockerfile").read_text()
    assert f" AS {words[image].partition(':')[2]}\n" in file
    if words[1] == "build":
        assert words[words.index("-f") + 1] == "deploy/Dockerfile"
        return []
    variables = [word.partition("=")[0] for before, word in pairwise(words[:image]) if before == "-e"]
    if "MODEL_ID" in variables:
        return ["text-generation-launcher", *(f"--{name.lower().replace('_', '-')}" for name in variables)]
    return ["squawq", "serve", *words[image + 1 :]]


def is_value(file: Path, path: str) -> bool:
    """Whether a chart has this value: a.b; what is below an empty value is Kubernetes' own."""
    found = yaml.safe_load(file.read_text())
    for key in path.split("."):
        if found == {}:
            return True
        if key not in found:
            return False
        found = found[key]
    return True


def check_options(words: list[str], line: str) -> None:
    """squawq's commands and options exist, those of make, helm and pip too."""
    if words[:1] == ["docker"]:
        words = in_a_container(words)
    if words[:1] in (["torchrun"], ["python"]) and "squawq" in words:
        words = words[words.index("squawq") :]
    if words[:1] in (["squawq"], ["text-generation-launcher"]):
        program, name = (app, [words[1]]) if words[0] == "squawq" else (launcher, [])
        shown = CliRunner().invoke(program, [*name, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, line
        for option in (word for word in words if word.startswith("-")):
            assert option in shown.output, line
    elif words[:1] == ["make"]:
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    elif words[:1] == ["helm"]:
        for before, word in pairwise(words):
            assert before != "--set" or is_value(ROOT / words[3] / "values.yaml", word.partition("=")[0]), line
    elif words[:1] == ["pip"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for word in words:
            if found := re.fullmatch(r"(?:\.|squawq)\[(.+)\]", word):
                assert found[1] in extras, line


@pytest.mark.parametrize("line", [command for _, command in LINES], ids=lambda line: " ".join(line.split()[:3]))
def test_options_exist(line: str) -> None:
    check_options(split(shlex.split(line, comments=True))[1], line)
