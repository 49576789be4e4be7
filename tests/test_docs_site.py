"""The documentation site: reference pages from the code, messages and paths that it quotes, and, where mkdocs is
installed, the whole site as `make docs` builds it.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import docs_reference
import pytest
import yaml
from pages import DOCS, PAGES, ROOT

import squawq
from squawq.cli import app
from squawq.serve import launcher, tgi_launcher
from squawq.serve.app import ROUTES
from squawq.serve.openapi_document import EXAMPLES

FILES = re.compile(r"`((?:src|tests|benchmarks|tools|deploy|examples|csrc|docs)/[\w./-]+|[A-Z]+\.md|compose\.yaml)`")
QUOTED = re.compile(r"^### `(.*)`$", re.MULTILINE)


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    return docs_reference.pages()


def test_reference_has_everything(reference: dict[str, str]) -> None:
    for command in app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        assert f"\n## squawq {name}\n" in reference["cli.md"]
    for page, flags in (("serve.md", launcher.FLAGS), ("launcher.md", tgi_launcher.FLAGS)):
        for flag in flags:
            assert re.search(rf"`{flag.name}[ `]", reference[page]), flag
            assert f"`{flag.variables[0]}`" in reference[page]
    for route in ROUTES:
        assert f"| `{route}` |" in reference["http.md"]
    for name in set(squawq.__all__) - {"__version__"}:
        assert f"::: {squawq._HOMES[name]}.{name}\n" in reference["python.md"]
    for field in ("max_tokens", "group_size", "tensor_parallel_size", "stop_reason"):
        (row,) = re.findall(rf"^\| `{field}` \|.*\|$", reference["python.md"], re.MULTILINE)
        assert not row.endswith("|  |"), row
    for metric in ("vllm:time_to_first_token_seconds", "tgi_request_count"):
        assert f"| `{metric}` |" in reference["metrics.md"]


def test_tables_have_no_empty_columns() -> None:
    assert docs_reference.table(("a", "b", "c"), [("1", "", "x"), ("2", "", "")]) == (
        "| a | c |\n|---|---|\n| 1 | x |\n| 2 |  |\n"
    )
    assert docs_reference.table(("a", "b"), []) == ""


def test_bodies_have_their_examples(reference: dict[str, str]) -> None:
    sections = dict(section.split("\n", 1) for section in reference["http.md"].split("\n## ")[1:])
    for body, (_, value) in EXAMPLES.items():
        (example,) = re.findall(r"Example:\n\n```json\n(.*?)```", sections[body.__name__], re.DOTALL)
        assert body.model_validate(json.loads(example))
        assert json.loads(example) == value


def test_tables_have_equal_rows(reference: dict[str, str]) -> None:
    for name, text in reference.items():
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            rows = (re.sub(r"`[^`]*`", "", row) for row in table.splitlines())
            widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
            assert len(widths) == 1, (name, table[:300])


@cache
def texts_of_source() -> tuple[str, ...]:
    """Every text in src/ that is no docstring, with … for what is filled in."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        docstrings = [node.value for node in nodes if isinstance(node, ast.Expr)]
        for node in (node for node in nodes if node not in docstrings):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def is_message(quoted: str) -> bool:
    pattern = re.compile(".*".join(map(re.escape, quoted.split("…"))), re.DOTALL)
    return any(pattern.search(text) for text in texts_of_source())


def test_quoted_messages_are_squawqs() -> None:
    messages = QUOTED.findall((DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(messages) >= 35
    assert [message for message in messages if not is_message(message)] == []
    assert not is_message("model_type is …; squawq has never heard of it")


def test_messages_name_no_page_that_an_installed_squawq_lacks() -> None:
    assert [text for text in texts_of_source() if re.search(r"docs/[\w/-]+\.md", text)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_and_links(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in FILES.findall(text):
        assert (ROOT / path).exists(), path
    for address in re.findall(r"\]\((\w+://[^)\s]*)\)", text):
        parts = urlsplit(address)
        assert parts.scheme == "https", address
        assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", parts.netloc), address
    for target in re.findall(r"\]\(([^)#:\s]+\.(?:md|svg))(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists() or "reference/" in target, target


def test_pictures_are_shown_and_described() -> None:
    shown = {}
    for page in PAGES:
        for text, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            shown[(page.parent / target).resolve()] = text
    assert {path.name for path in shown} == {path.name for path in (DOCS / "pictures").glob("*.svg")}
    assert all(len(text) > 40 for text in shown.values())


class BuiltPage(HTMLParser):
    """A page of the site: what it loads by itself when it is shown, its links, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {values.get("id") or ""}
        if tag == "a":
            self.links.append(values.get("href") or "")
        if tag in ("script", "img", "iframe", "source", "video") and values.get("src"):
            self.found.append(values["src"] or "")
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.found.append(values.get("href") or "")


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: pip install '.[docs]'")
def test_site_is_built_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    docs_reference.main(DOCS / "reference")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    pages = {path: BuiltPage(path) for path in (tmp_path / "site").rglob("*.html")}
    assert len(pages) >= 40
    for path, page in pages.items():
        assert not [address for address in page.found if urlsplit(address).netloc], path
        for link in map(urlsplit, page.links):
            target = (path.parent / link.path).resolve() if link.path else path
            if not link.netloc and target in pages and path.name != "404.html":
                assert link.fragment in pages[target].anchors, (path, link.geturl())
    index = json.loads((tmp_path / "site" / "search" / "search_index.json").read_text(encoding="utf-8"))
    boosts = {entry["location"]: entry.get("boost", 1) for entry in index["docs"]}
    assert boosts["start/run.html"] > boosts["explanation/inference.html"] > boosts["reference/http.html"]
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:|@import", sheet.read_text(encoding="utf-8")), sheet


def test_every_page_is_in_the_navigation() -> None:
    """mkdocs says so too, but is not installed everywhere."""
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2])
    assert len(listed) == len(set(listed))
    here = {page.relative_to(DOCS).as_posix() for page in PAGES if page.is_relative_to(DOCS)}
    assert {*listed} == here | {f"reference/{name}" for name in docs_reference.pages()}
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["theme"]["font"] is False
