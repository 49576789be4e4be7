"""SIGINT and SIGTERM during quantization: the first stops after the current layer, the second at once.

Only the command line handles signals; squawq.quantize raises KeyboardInterrupt like any function.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from types import FrameType
from typing import Any

from squawq.progress import LayerProgress, console

COMPARING = "while the finished folder was compared with the 16-bit model"
AGAIN = "run the same command again to resume"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """The user stopped the work; says how to resume. As with KeyboardInterrupt, nothing should catch it on its way."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message, number)  # distributed.py rebuilds it from these on the other ranks
        self.code = 128 + number

    def __str__(self) -> str:
        return str(self.args[0])


class StoppableProgress(LayerProgress):
    """Progress that raises `Stopped` after the current layer on the first signal, and at once on the second.

    Args:
        shown: Print progress; under torchrun only the first process does.
        stops_at_once: See `Ranks`. torchrun sends all processes the terminal's signal, and it arrives twice.
    """

    def __init__(self, shown: bool = True, stops_at_once: bool = True) -> None:
        super().__init__()
        self._shown, self._stops_at_once = shown, stops_at_once
        self._layers = self._done = 0
        self._asked: int | None = None

    def __enter__(self) -> StoppableProgress:
        super().__enter__()
        self._before = [signal.signal(number, self._handle) for number in SIGNALS]
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, before)
        super().__exit__(*error)

    def _handle(self, number: int, _: FrameType | None) -> None:
        first, self._asked = self._asked is None, self._asked or number
        if self._stops_at_once and not self._layers:
            self._stop("before the first layer")
        if self._stops_at_once and not first:
            self._stop(COMPARING if self._done == self._layers else f"in layer {self._done + 1} of {self._layers}")
        if self._shown and first:
            more = "; once more stops at once" if self._stops_at_once else ""
            console.print(f"stopping when this layer is done{more}")

    def _stop(self, where: str) -> None:
        """Stop if that was asked for."""
        if self._asked is not None:
            raise Stopped(f"stopped {where}; {AGAIN}", self._asked)

    def generating(self, what: str, done: int, total: int) -> None:
        if self._shown:
            super().generating(what, done, total)
        self._stop("while " + what.partition(", ")[0])

    def start(self, layers: int, tokens: int, resumed: int, runs_in: str) -> None:
        if self._shown:
            super().start(layers, tokens, resumed, runs_in)
        self.started = True
        self._layers = layers
        self._stop("before the first layer")

    def tuning(self, step: int, steps: int) -> None:
        if self._shown:
            super().tuning(step, steps)
        if step < steps:
            self._stop(f"in step {step} of {steps} of tuning, which begins again")

    def layer(self, record: Mapping[str, Any]) -> None:
        if self._shown:
            super().layer(record)
        self._done += 1
        if self._done < self._layers:
            self._stop(f"after layer {self._done} of {self._layers}")

    def read_back(self, layers: int) -> None:
        if self._shown:
            super().read_back(layers)
        if layers < self._layers:
            self._stop(COMPARING)
