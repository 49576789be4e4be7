"""README.md and the pages of the documentation site: their code blocks, and which of them the tests run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in DOCS.rglob("*.md") if page.parent.name != "reference"),  # generated from the code
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n(?:\n(\*[^*]+\*)$)?", re.DOTALL | re.MULTILINE)
MARK = "not run by the tests"


@dataclass(frozen=True)
class Block:
    """A code block. note: the emphasized paragraph below it, if there is one."""

    page: Path
    language: str
    code: str
    note: str

    @property
    def runs(self) -> bool:
        return MARK not in " ".join(self.note.lower().split())

    @property
    def name(self) -> str:
        return f"{self.page.stem}-{self.code.split(maxsplit=2)[1][:20]}"

    def commands(self) -> Iterator[str]:
        """The command lines of a shell block; those that a backslash or an open quote continues are one."""
        command = ""
        for line in self.code.splitlines():
            command += line
            if line.endswith("\\"):
                command = command[:-1]
                continue
            try:
                words = shlex.split(command, comments=True)
            except ValueError:  # a quote is open
                command += "\n"
                continue
            if words:
                yield command
            command = ""
        assert not command, command


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(page, language, code, note or "") for language, code, note in BLOCK.findall(text)]


BLOCKS = [block for page in PAGES for block in blocks(page)]
