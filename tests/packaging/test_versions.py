"""squawq's version is written in src/squawq/__init__.py; what repeats it agrees."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml

from squawq import __version__

ROOT = Path(__file__).parents[2]


def test_the_package_has_it_from_the_module() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
    assert version("squawq") == __version__, "install again: make test"


def test_the_chart_has_it() -> None:
    chart = yaml.safe_load((ROOT / "deploy" / "helm" / "squawq" / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__


def test_the_changelog_has_a_heading_for_it() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert __version__ in headings
