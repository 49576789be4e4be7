"""The evaluation that a model card quotes: from a file of `squawq eval --json`, or from the folder's report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from squawq.errors import ConfigError
from squawq.format.files import parse_json
from squawq.report.schema import Report

FIGURES = ("tokens", "window", "stride", "perplexity")
COMPARED = ("reference_perplexity", "kl_mean", "kl_p99", "top1_agreement")  # with --reference, all of them
Scores = dict[str, Any]


def read_scores(path: Path, folder: Path, repo: str) -> Scores:
    """The figures of a file. Raises ConfigError for another file, and for a model not called as `folder` or `repo`."""
    try:
        read = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not what `squawq eval --json` prints: {error}") from error
    scores = figures(read)
    if scores is None or not isinstance(read.get("model"), str):
        needed = (*FIGURES, *(COMPARED if isinstance(read, dict) and any(key in read for key in COMPARED) else ()))
        raise ConfigError(f"{path} is not what `squawq eval --json` prints: it needs model, {', '.join(needed)}")
    names = (folder.resolve().name, repo.partition("/")[2])
    if Path(read["model"]).resolve().name not in names:
        raise ConfigError(f"{path} is of {read['model']!r}; it must be of {' or '.join(dict.fromkeys(names))}")
    return scores


def stored_scores(report: Report | None) -> Scores | None:
    """What `squawq eval --reference` has put into the report; None without it, or where a figure is missing."""
    return None if report is None or report.evaluation is None else figures(report.evaluation.to_dict())


def figures(read: object) -> Scores | None:
    """The figures that a card quotes and the text's name; None where one of them is missing or no number."""
    if not isinstance(read, dict):
        return None
    needed = (*FIGURES, *(COMPARED if any(key in read for key in COMPARED) else ()))
    if not all(_is_number(read.get(key)) for key in needed):
        return None
    text = read.get("text")
    return {key: read[key] for key in needed} | ({"text": plain(text)} if isinstance(text, str) else {})


def plain(name: str) -> str:
    """A name without what markdown, HTML or a line could take for more than text."""
    return re.sub(r"[^\w ./+,()@-]+", "_", name)[:200]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300
