"""Progress on stderr: bars with the time left, and a line for each layer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from squawq.errors import printable


class PlainConsole(Console):
    """rich's, for text as it is. Names and messages come from model folders too: they may look like markup or hold
    control characters, which are escaped. Lines are never wrapped: a suggested command is pasted whole."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich does; every text that is printed, and every cell of a table, comes through here."""
        return super().render_str(printable(text, keep="\n\t"), **options)


console = PlainConsole(stderr=True)


def output() -> Console:
    """stdout for tables; where it is no terminal they are as wide as they need."""
    wide = PlainConsole()
    if not wide.is_terminal:
        wide.width = 10_000
    return wide


def discard_stdout() -> None:
    """Redirect stdout, which failed, to the null device: Python would flush it again at exit, and complain."""
    with Path(os.devnull).open("wb") as null:
        os.dup2(null.fileno(), sys.stdout.fileno())


def bar() -> Progress:
    """A bar with count, time gone and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,  # a log gets the lines alone
    )


class LayerProgress:
    """A quantization's observer: a bar over the layers, and each layer's error by plain rounding and as kept.

    Nothing is shown before the work starts, so that an error stays one line. started: whether there was work to do.
    """

    def __init__(self) -> None:
        self.started = False
        self._bar = bar()
        self._task = self._bar.add_task("quantizing", total=None, visible=False)
        self._generating: TaskID | None = None
        self._what: str | None = None

    def __enter__(self) -> LayerProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def generating(self, what: str, done: int, total: int) -> None:
        if self._generating is None or what != self._what:
            console.print(what)
            if self._generating is not None:
                self._bar.remove_task(self._generating)
            self._generating, self._what = self._bar.add_task(what.split()[0], total=total), what
            self._bar.start()
        self._bar.update(self._generating, completed=done)

    def start(self, layers: int, tokens: int, resumed: int, runs_in: str) -> None:
        self.started = True
        console.print(runs_in)
        if tokens:
            console.print(f"{layers} layers, {tokens:,} calibration tokens")
        if resumed:
            console.print(f"going on with a run that was stopped: {resumed} of {layers} layers are on disk")
        if self._generating is not None:
            self._bar.remove_task(self._generating)
        self._bar.reset(self._task, total=layers, visible=True)
        self._bar.start()

    def layer(self, record: Mapping[str, Any]) -> None:
        self._bar.advance(self._task)
        if (error := record.get("relative_error")) is not None:
            rounded = record["relative_error_rounded"]
            plain = "" if rounded is None else f" (plain rounding: {rounded:.2%})"
            console.print(f"{record['name']}  output off by {error:.2%}{plain}")
        for note in record["notes"]:
            console.print(f"{record['name']}  note: {note}", style="yellow")

    def tuning(self, step: int, steps: int) -> None:
        if step == 1:
            self._tuning = self._bar.add_task("tuning scales", total=steps)
        self._bar.update(self._tuning, completed=step)

    def read_back(self, layers: int) -> None:
        if layers == 1:
            console.print("comparing the finished folder with the 16-bit model")
        self._bar.update(self._task, description="comparing", completed=layers)


@contextmanager
def counting(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar as a callback (done, total); it shows from the first call on."""
    progress = bar()
    task = progress.add_task(description, total=None)

    def update(done: int, total: int) -> None:
        progress.start()
        progress.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        progress.stop()
