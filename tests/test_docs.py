"""Python on README.md and docs/ runs as pasted, with no more than what the page says to install.

Model names stand for small local models, and a server's address for one that listens here. A block with a note that it
is not run is only compiled. test_docs_commands.py has the shell blocks.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from packaging.requirements import Requirement
from pages import BLOCKS, PAGES, ROOT, Block

if TYPE_CHECKING:
    from running import Running

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
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


PYTHON = [block for block in BLOCKS if block.language == "python"]
LANGUAGES = ("python", "sh", "json", "yaml", "text", "")


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


def test_every_block_has_a_language_and_is_tested() -> None:
    assert len([block for block in PYTHON if block.runs]) >= 12
    for block in BLOCKS:
        assert block.language in LANGUAGES, block
        if block.language not in ("python", "sh"):
            assert not re.search(r"^\s*(squawq|pip|make|python|import|from) ", block.code, re.MULTILINE), block
    for page in PAGES:  # a command that is indented, not fenced
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        assert not re.search(r"^ {4,}(squawq|pip|make|torchrun|curl) ", text, re.MULTILINE), page


@pytest.mark.timeout(900)  # a new process each, which imports torch and transformers
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_python(block: Block, small: Path, awq_demo: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    code = block.code
    compile(code, block.name, "exec")
    if not block.runs:
        return
    if LOCAL in code:
        server: Running = request.getfixturevalue("server")
        code = code.replace(LOCAL, server.url)
    for source in SOURCES:
        code = code.replace(f'"{source}"', repr(str(small)))
    made = re.search(r"\.quantize\(|save_quantized", code) is not None
    for folder in FOLDERS:
        code = code.replace(f'"{folder}"', repr(str(tmp_path / "out" if made else awq_demo)))
    program = HIDE.format(hidden=hidden(block.page)) + code
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


def test_readme_lists_the_extras_and_begins_with_the_installation() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)", text, re.MULTILINE)[0] == "Install"
    table = text.partition("| extra |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == sorted(PROJECT["optional-dependencies"])
