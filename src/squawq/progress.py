"""Progress on stderr: bars with the time left, and a line for every layer. Knows the report's rows, no algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from squawq.errors import printable


class PlainConsole(Console):
    """A console that shows text as it is: names come from downloaded folders, and may look like markup or hold control
    characters, which are escaped."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich does; every text that is printed, and every cell of a table, comes through here."""
        return super().render_str(printable(text, keep="\n\t"), **options)


console = PlainConsole(stderr=True)


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
    )


class LayerProgress:
    """A quantization's observer: a bar over the layers, and each layer's loss before and after.

    Nothing shows before the work starts, so that a misuse stays one line.
    """

    def __init__(self) -> None:
        self._bar = bar()
        self._task = self._bar.add_task("quantizing", total=None)

    def __enter__(self) -> LayerProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, layers: int, tokens: int, resumed: int) -> None:
        if tokens:
            console.print(f"{layers} layers, {tokens:,} calibration tokens")
        if resumed:
            console.print(f"going on with a run that was stopped: {resumed} of {layers} layers are on disk")
        self._bar.reset(self._task, total=layers)
        self._bar.start()

    def layer(self, record: Mapping[str, Any]) -> None:
        self._bar.advance(self._task)
        before, after = record["loss_rounded"], record["loss"]
        if before is not None and after is not None:
            change = f"{(after - before) / before:+.0%}" if before else "no change"
            console.print(
                f"{record['name']}  loss {before:.3g} rounded, {after:.3g} with {record['method']} ({change})"
            )
        for note in record["notes"]:
            console.print(f"{record['name']}  note: {note}", style="yellow")


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
