"""The report's two files beside the weights: written together, so that the page always shows what the JSON says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from squawq.format.files import clear_temporary, locked, read_json, write_json, write_text
from squawq.report.page import render

REPORT = "squawq_report.json"
PAGE = "report.html"


def write_report(folder: Path, report: Mapping[str, Any], name: str) -> None:
    """Write both files. Raises CheckpointError, with nothing written, for a report that is none.

    name: Of the folder once it is finished, for the page.
    """
    page = render(report, name)
    write_json(folder / REPORT, report)
    write_text(folder / PAGE, page)


def add_evaluation(folder: Path, reference: str | Path, scores: Mapping[str, Any]) -> None:
    """Put what `evaluate` measured against `reference` into the report, in place of an earlier evaluation.

    Raises CheckpointError for a report that cannot be read, OutputError for a folder that cannot be written.
    """
    evaluation = {"reference": public_name(reference), **scores}
    with locked(folder, wait=True):
        clear_temporary(folder)
        write_report(folder, {**read_json(folder / REPORT), "evaluation": evaluation}, public_name(folder))


def public_name(model: str | Path) -> str:
    """A model as a report may name it: a Hub id, or a folder's own name without the way to it."""
    path = Path(model)
    return path.resolve().name if path.exists() else str(model)
