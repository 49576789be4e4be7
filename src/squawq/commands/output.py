"""Prints results on stdout; if that fails, as on a full disk, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO

from squawq.errors import OutputError, SquawqError
from squawq.progress import discard_stdout


@contextmanager
def results() -> Iterator[None]:
    """What is printed in this context goes to stderr where stdout cannot be written; then OutputError is raised."""
    if sys.stdout.isatty():
        yield
        return
    with redirect_stdout(StringIO()) as text:
        yield
    shown = text.getvalue()
    if encoding := sys.stdout.encoding:  # PYTHONIOENCODING=ascii: a question mark, rather than nothing
        shown = shown.encode(encoding, "replace").decode(encoding)
    try:
        print(shown, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_stdout()
        print(text.getvalue(), end="", file=sys.stderr)
        raise OutputError(f"stdout cannot be written: {error.strerror}; the result is shown here instead") from error


def do_all(*steps: Callable[[], object]) -> None:
    """Do every step, whatever became of those before; then raise OutputError with what failed."""
    failures = []
    for step in steps:
        try:
            step()
        except SquawqError as error:
            failures.append(str(error))
    if failures:
        raise OutputError("; ".join(failures))
