"""Renders report.html: one file that loads nothing else, for phones too, light or dark.

Names and notes come from downloaded models: jinja2 escapes everything, and the page's own policy (CSP) lets nothing
run but the script of this package, nothing load at all.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from squawq.errors import CheckpointError, printable
from squawq.report.drawings import sections
from squawq.report.schema import Report
from squawq.report.words import HEADINGS, facts, headline, summary, table


def render(report: Mapping[str, Any], name: str) -> str:
    """The page of a report as squawq_report.json has it. Raises CheckpointError for one that is none.

    name: Of the folder that the report is of.
    """
    found = Report.read(report)
    style, script = _read("page.css"), _read("page.js")
    try:
        return _template().render(
            name=name,
            headline=headline(found, name),
            facts=facts(found, name),
            summary=summary(found),
            sections=sections(found),
            headings=HEADINGS,
            table=table(found),
            notes=found.notes,
            kept=[(row.name, row.reason) for row in found.kept_in_16_bits],
            style=Markup(style),
            script=Markup(script),
            style_hash=_hash(style),
            script_hash=_hash(script),
        )
    except (ValueError, ArithmeticError) as error:  # numbers of the right kind and beyond any sense
        raise CheckpointError(f"the report is not as squawq quantize writes it: {error!r:.200}") from error


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, finalize=_shown, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_read("page.html"))


def _shown(value: Any) -> Any:
    """Names may turn the text around them over, as control characters do."""
    return printable(value, keep="\n\t") if type(value) is str else value


def _read(name: str) -> str:
    return (files("squawq") / "report" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a policy names an inline script or style that it lets through."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
