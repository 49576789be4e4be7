"""Shared by the peers' scripts: reading the calibration rows, and the last line with seconds and peak memory.

Runs in every peer's environment, so it uses the standard library only.
"""

import json
import resource
import time
from pathlib import Path


def read_rows(path: str) -> list[list[int]]:
    """Token ids, rows of equal length."""
    rows: list[list[int]] = json.loads(Path(path).read_text())
    return rows


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
