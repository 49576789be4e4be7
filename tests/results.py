"""What a run left in its folder, to be compared with what another run left."""

from __future__ import annotations

import json
from pathlib import Path

from squawq.memory import MEASURED
from squawq.report.files import REPORT


def contents(folder: Path) -> dict[str, bytes]:
    """All files."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def settled(folder: Path) -> dict[str, bytes]:
    """A result's files without what each run measures anew: times in the report, and the page that shows them."""
    files = contents(folder)
    assert b"<!doctype html>" in files.pop("report.html")
    report = json.loads(files[REPORT])
    report.pop("date")
    (report.get("tuning") or {}).pop("seconds", None)
    for layer in report["layers"]:
        for key in MEASURED:
            layer.pop(key, None)
    return {**files, REPORT: json.dumps(report).encode()}
