"""The code on a model card, run as it stands but for the model's place, the server's address and fewer tokens."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import programs
import pytest
from running import process

from squawq.compatibility import TGI_IMAGE
from squawq.publish.usage import usage

REPO = "me/demo-AWQ"
LOCAL = "http://localhost:8000"


def blocks(language: str, folder: Path, chat: bool) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", usage(REPO, chat), re.DOTALL)
    return [block.replace(REPO, str(folder)).replace("=256", "=24") for block in found]


def run(code: str) -> str:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody
    done = programs.run(["-c", code], env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def address(awq_demo: Path) -> Iterator[str]:
    """Of the card's own server line."""
    line = next(line for line in blocks("sh", awq_demo, True)[0].splitlines() if " serve " in line)
    program, *arguments = shlex.split(line)
    assert program == "squawq"
    arguments[arguments.index("8000")] = "0"
    with process(arguments) as (_, url):
        yield url


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("mark", ["from squawq import LLM", "import squawq.transformers", "from awq import"])
def test_engines(awq_demo: Path, mark: str, chat: bool) -> None:
    (code,) = (block for block in blocks("python", awq_demo, chat) if mark in block)
    assert len(run(code).split()) >= 10


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("mark", ["OpenAI(", "InferenceClient("])
def test_clients(awq_demo: Path, address: str, mark: str, chat: bool) -> None:
    (code,) = (block for block in blocks("python", awq_demo, chat) if mark in block)
    assert LOCAL in code
    assert len(run(code.replace(LOCAL, address)).split()) >= 10


def test_the_launchers_line_is_read() -> None:
    """The flags after TGI's image, by our launcher, which stops at the model that is not there."""
    (line,) = (line for line in usage(REPO, True).splitlines() if TGI_IMAGE in line)
    done = programs.run(
        ["-m", "squawq.serve.tgi_launcher", *shlex.split(line.partition(TGI_IMAGE)[2])],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"},
    )
    assert done.returncode == 2
    assert REPO in done.stderr
