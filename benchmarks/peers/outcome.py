"""Shared by the peers' scripts: reading the calibration rows, and the last line with seconds and peak memory.

Runs in every peer's environment, so it imports the standard library only.
"""

import json
import resource
import time
from pathlib import Path
from typing import Any


def read_rows(path: str) -> list[list[int]]:
    """Token ids, rows of equal length."""
    rows: list[list[int]] = json.loads(Path(path).read_text())
    return rows


def tokenizer_of(model: str) -> Any:
    """The folder's tokenizer; one of a single token if it has none. Peers want one even if they get token ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (Path(model) / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(model)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")), unk_token="?")


class Clock:
    """Starts when created; `report` prints a JSON line with the elapsed seconds and this process's peak memory."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._seconds = 0.0

    def stop(self) -> None:
        self._seconds = time.monotonic() - self._started

    def report(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": self._seconds, "peak_bytes": peak}))
