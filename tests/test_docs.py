"""Code on README.md and docs/: Python runs as pasted, with no more than what the page says to install; commands exist.

Model names stand for small local models, and a server's address for one that listens here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from packaging.requirements import Requirement
from safetensors.torch import save_file
from typer.testing import CliRunner

from squawq.cli import app
from squawq.demo import demo_model
from squawq.format.reader import Checkpoint
from squawq.serve.tgi_launcher import app as launcher

if TYPE_CHECKING:
    from running import Running

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KNOWN = (
    "pip",
    "curl",
    "pytest",
    "vllm",
    "python3",
    "install",
    "systemctl",
    "journalctl",
    "git",
    "export",
    "sed",
    "pipx",
)
LOCAL = "http://localhost:8000"
SOURCES = ("Llama-3.2-1B-Instruct",)  # 16-bit models
FOLDERS = ("Llama-3.2-1B-AWQ", "OUT")
HIDE = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hidden = set({hidden!r})
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in hidden else find(name, *rest)
"""  # as if it were not installed


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [code for language, code in found if language in languages]


PYTHON = [(page.name, code) for page in PAGES for code in blocks(page, "python")]
SHELL = [(page.name, code) for page in PAGES for code in blocks(page, "sh")]


def installed(page: Path) -> set[str]:
    """The distributions that somebody has who did what the page says: squawq's own, its extras, other packages."""
    wanted = list(PROJECT["dependencies"])
    for arguments in (
        re.findall(r"pip install ([^`#\n]+)", page.read_text(encoding="utf-8")) if page.name != "README.md" else ()
    ):
        for word in (word for word in shlex.split(arguments) if not word.startswith("-")):
            extras = re.fullmatch(r"(?:\.|squawq)\[(.+)\]", word)
            wanted += PROJECT["optional-dependencies"][extras[1]] if extras else [] if word == "." else [word]
    found: set[str] = set()
    while wanted:
        requirement = Requirement(wanted.pop())
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            wanted += distribution(name).requires or []
        except ModuleNotFoundError:  # of another platform
            continue
        found.add(name)
    return found


def hidden(page: Path) -> list[str]:
    """Top-level modules that are installed here and would not be there."""
    have = {*installed(page), "squawq", "pip", "setuptools"}
    owners = packages_distributions().items()
    return sorted(m for m, who in owners if not have & {re.sub(r"[-_.]+", "-", name).lower() for name in who})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's first layer with a short context: a whole quantization of it takes seconds."""
    folder = tmp_path_factory.mktemp("docs") / "model"
    shutil.copytree(demo_model(), folder, ignore=shutil.ignore_patterns("*.safetensors", "held_back.txt"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "max_position_embeddings": 96}))
    source = Checkpoint(demo_model())
    kept = [name for name in source.tensors if not re.match(r"model\.layers\.[1-9]", name)]
    save_file({name: source.read(name) for name in kept}, folder / "model.safetensors")
    return folder


def test_every_block_has_a_language_and_is_tested() -> None:
    assert len(PYTHON) >= 7
    assert len(SHELL) >= 4
    for page in PAGES:
        for code in blocks(page, ""):
            assert not re.search(r"^\s*(squawq|pip|make|python|import|from) ", code, re.MULTILINE), (page.name, code)


@pytest.mark.timeout(900)  # a new process each, which imports torch and transformers
@pytest.mark.parametrize("index", range(len(PYTHON)), ids=[f"{name}-{i}" for i, (name, _) in enumerate(PYTHON)])
def test_python(index: int, small: Path, awq_demo: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    name, code = PYTHON[index]
    page = next(page for page in PAGES if page.name == name)
    if LOCAL in code:
        server: Running = request.getfixturevalue("server")
        code = code.replace(LOCAL, server.url)
    for source in SOURCES:
        code = code.replace(f'"{source}"', repr(str(small)))
    made = re.search(r"\.quantize\(|save_quantized", code) is not None
    for folder in FOLDERS:
        code = code.replace(f'"{folder}"', repr(str(tmp_path / "out" if made else awq_demo)))
    program = HIDE.format(hidden=hidden(page)) + code
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"


def test_what_is_hidden_is_not_there() -> None:
    """Else the test above could not fail."""
    missing = hidden(ROOT / "README.md")
    assert {"accelerate", "openai", "gguf", "pytest"} <= set(missing)
    assert not {"torch", "transformers", "huggingface_hub", "typer"} & set(missing)
    done = subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden=missing) + "import accelerate"], capture_output=True
    )
    assert b"No module named 'accelerate'" in done.stderr


def in_a_container(words: list[str]) -> list[str]:
    """The command line that a container runs, by deploy/entrypoint.sh; of `docker build` nothing."""
    file = (ROOT / "deploy" / "Dockerfile").read_text()
    image = next(index for index, word in enumerate(words) if word.startswith("squawq:"))
    assert f" AS {words[image].partition(':')[2]}\n" in file
    if words[1] == "build":
        assert words[words.index("-f") + 1] == "deploy/Dockerfile"
        return ["make", "test"]
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


@pytest.mark.parametrize("index", range(len(SHELL)), ids=[f"{name}-{i}" for i, (name, _) in enumerate(SHELL)])
def test_commands_and_their_options_exist(index: int) -> None:
    code = SHELL[index][1].replace("\\\n", " ")
    for line in code.splitlines():
        words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        words[:1] = [Path(word).name for word in words[:1]]
        if words[:1] == ["docker"]:
            words = in_a_container(shlex.split(line))
        if words[:1] == ["squawq"]:
            shown = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200"})
            assert shown.exit_code == 0, line
            for option in (word for word in words if word.startswith("-")):
                assert option in shown.output, line
        elif words[:1] == ["text-generation-launcher"]:
            shown = CliRunner().invoke(launcher, ["--help"], env={"COLUMNS": "200"})
            for option in (word for word in words if word.startswith("-")):
                assert option in shown.output, line
        elif words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif words[:1] == ["helm"]:
            for before, word in pairwise(words):
                assert before != "--set" or is_value(ROOT / words[3] / "values.yaml", word.partition("=")[0]), line
        else:
            assert words[0] in KNOWN, line


def test_readme_lists_the_extras_and_begins_with_the_installation() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)", text, re.MULTILINE)[0] == "Install"
    table = text.partition("| extra |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == sorted(PROJECT["optional-dependencies"])
