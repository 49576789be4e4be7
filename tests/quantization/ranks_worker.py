"""One of two processes of test_ranks.py: runs of one process group, each rank's end of them in a file of its own."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from squawq.commands.stopping import StoppableProgress, Stopped
from squawq.distributed import Ranks, torchrun_ranks
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize


class Stopping:
    """An observer that stops the run after a layer."""

    def start(self, layers: int, tokens: int, resumed: int, runs_in: str) -> None:
        self.resumed = resumed

    def layer(self, record: Mapping[str, Any]) -> None:
        raise KeyboardInterrupt

    def read_back(self, layers: int) -> None: ...


class Signalled(StoppableProgress):
    """What the command line has; the second process is sent SIGINT in the first layer, twice as torchrun does it."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(shown=False, stops_at_once=False)
        self._ranks = ranks

    def layer(self, record: Mapping[str, Any]) -> None:
        for _ in range(0 if self._ranks.first or self._done else 2):
            os.kill(os.getpid(), signal.SIGINT)
        super().layer(record)


def end_of(run: Callable[[], Any]) -> str:
    try:
        return f"report of {len(run()['layers'])} layers"
    except (Exception, KeyboardInterrupt, Stopped) as error:
        return f"{type(error).__name__}: {error}"


def run_all(ranks: Ranks, model: Path, rows: list[list[int]], folder: Path) -> dict[str, str]:
    def run(name: str, rows: list[list[int]], /, token_weights: bool = False, **options: Any) -> str:
        config = QuantConfig(group_size=32, seqlen=32, samples=len(rows), token_weights=token_weights)
        out = folder / name
        return end_of(lambda: quantize(model, out, config, calibration=rows, ranks=ranks, **options))

    ends = {
        "straight": run("straight", rows),
        "again": run("straight", rows),
        "weighted": run("weighted", rows, token_weights=True),
        "stopped": run("stopped", rows, observer=Stopping()),
        "resumed": run("stopped", rows),
        "stopped again": run("left", rows, observer=Stopping()),
        "few": run("few", rows[:1]),
        "other text": run("other", rows if ranks.first else rows[::-1]),
        "bad device": run("other", rows, device="cuda:0"),
        "streamed": run("other", rows, stream=True),
        "rounded": end_of(
            lambda: quantize(model, folder / "rounded", QuantConfig(group_size=32, method="rtn"), ranks=ranks)
        ),
    }
    with Signalled(ranks) as observer:
        ends["signalled"] = run("signalled", rows, observer=observer)
    ends["signalled, resumed"] = run("signalled", rows)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not ranks.first:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    ends["full disk"] = run("full", rows, states_memory=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return ends


def main(model: str, folder: str) -> None:
    rows = json.loads((Path(folder) / "rows.json").read_text())
    with torchrun_ranks("cpu") as ranks:
        ends = run_all(ranks, Path(model), rows, Path(folder))
        report = Path(folder) / f"{ranks.rank}.json"
        report.write_text(json.dumps(ends))
        if not ranks.first:
            os.kill(os.getpid(), signal.SIGKILL)
        ends["gone"] = end_of(lambda: quantize(model, Path(folder) / "gone", calibration=rows, ranks=ranks))
        report.write_text(json.dumps(ends))


if __name__ == "__main__":
    main(*sys.argv[1:])
