"""SECURITY.md names the tests that hold each promise; they are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_named_tests_are_there() -> None:
    named = re.findall(r"`(tests/[\w/.]+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(set(named)) > 15
    assert [name for name in named if not (ROOT / name).is_file()] == []
