"""The libraries of the web pages are the files that tools/vendor.py copied, with their licences."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files
from pathlib import Path

VENDOR = Path(str(files("squawq.serve.web"))) / "vendor"
ROW = re.compile(r"^\| (\S+) \| (\S+ \S+) \| .* \| ([0-9a-f]{64}) \|$", re.MULTILINE)


def recorded() -> dict[str, str]:
    """Hashes by file, as vendor/README.md records them."""
    text = (VENDOR / "README.md").read_text(encoding="utf-8")
    return {name: digest for name, _, digest in ROW.findall(text)}


def test_each_file_is_as_it_was_copied_and_nothing_else_is_there() -> None:
    paths = [path for path in VENDOR.rglob("*") if path.is_file() and path != VENDOR / "README.md"]
    found = {path.relative_to(VENDOR).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert found == recorded()


def test_each_library_has_its_licence() -> None:
    folders = {name.partition("/")[0] for name in recorded()}
    assert folders
    assert all(f"{folder}/LICENSE" in recorded() for folder in folders)
