"""Shared by the benchmarks: a table on stdout, and running a quantizer in its own environment and process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PEERS = Path(__file__).parent / "peers"


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], width: int = 110) -> None:
    """First column left, the others right."""
    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)


def quantize_apart(
    peer: str,
    python: str,
    model: Path,
    out: Path,
    rows: Path,
    settings: Mapping[str, Any],
    patience: float | None = None,
) -> dict[str, Any]:
    """Run peers/PEER_quantize.py with the interpreter of its environment.

    Returns `seconds` (of quantization alone) and `peak_bytes`. rows: a JSON file with lists of token ids. If the peer
    fails, the benchmark ends with the peer's error message. Raises subprocess.TimeoutExpired, and stops the peer, after
    `patience` seconds.
    """
    script = PEERS / f"{peer}_quantize.py"
    command = [python, str(script), str(model), str(out), str(rows), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience)
    if done.returncode:
        sys.exit(f"{python} {script.name} failed:\n{done.stderr[-3000:]}")
    outcome: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return outcome
