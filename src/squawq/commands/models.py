"""`squawq models`: what is on this machine, and what runs it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from squawq.commands.output import results

if TYPE_CHECKING:
    from squawq.local_models import LocalModel


def models(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER]...",
            help="Where to look, two levels deep, beside the Hub's cache and squawq's own; default: the current folder",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a list of models")] = False,
) -> None:
    """List the models on this machine: format, size, and what runs them.

    \b
    Examples:
      squawq models
      squawq models ~/models /data/models --json
    """
    from squawq.errors import ConfigError
    from squawq.local_models import local_models

    for folder in folders or ():
        if not folder.is_dir():
            raise ConfigError(f"{str(folder)!r} is no folder")
    found = local_models(folders or [Path()])
    with results():
        if as_json:
            print(json.dumps([asdict(model) for model in found]))
        else:
            _print(found)


def _print(found: list[LocalModel]) -> None:
    from squawq.progress import output

    console = output()
    if found:
        console.print(_table(found), soft_wrap=False)
    else:
        console.print("no models here; squawq run MODEL fetches one from the Hub")


def _table(found: list[LocalModel]) -> Any:
    from rich.table import Table

    from squawq.commands.inspect import size

    table = Table()
    for heading in ("model", "family", "format", "size", "runs in"):
        table.add_column(heading, justify="right" if heading == "size" else "left", overflow="fold")
    for model in found:
        runs = ", ".join(model.runs_in)
        if model.note:
            state = "broken: " if model.broken else "" if runs else "not supported: "
            runs = f"{runs}; {model.note}" if runs else state + model.note
        shown = size(model.bytes).partition(" (")[0]
        table.add_row(model.name, model.family, model.format, shown, runs, style="red" if model.broken else "")
    return table
