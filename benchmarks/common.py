"""Shared by the benchmarks: a table on stdout, and running a quantizer in its own environment and process."""

from __future__ import annotations

import json
import os
import subprocess
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


class PeerFailed(SystemExit):
    """A peer's script has failed. Ends the benchmark with its error messages if nothing catches it."""

    def __init__(self, command: str, errors: str) -> None:
        super().__init__(f"{command} failed:\n{errors[-3000:]}")
        self.reason = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no error message")


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

    Returns `seconds` (of quantization alone) and `peak_bytes` of host memory. rows: a JSON file with lists of token
    ids. settings: "device" is the CPU by default; the peer then sees no GPU. Raises PeerFailed if the peer fails, and
    subprocess.TimeoutExpired after `patience` seconds, when the peer is stopped.
    """
    script = PEERS / f"{peer}_quantize.py"
    command = [python, str(script), str(model), str(out), str(rows), json.dumps(settings)]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if settings.get("device", "cpu") == "cpu" else {}
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience, env=os.environ | hidden)
    if done.returncode:
        raise PeerFailed(f"{python} {script.name}", done.stderr)
    outcome: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return outcome
