"""The command line: parse, call, print.

Results go to stdout, everything else to stderr; a misuse is one line and exit code 2.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from typing import Annotated

import typer

from squawq import __version__
from squawq.commands.bench import bench
from squawq.commands.chat import chat
from squawq.commands.demo import demo
from squawq.commands.evaluate import evaluate
from squawq.commands.export import export
from squawq.commands.generate import generate
from squawq.commands.inspect import inspect
from squawq.commands.models import models
from squawq.commands.push import push
from squawq.commands.quantize import quantize
from squawq.commands.run import run
from squawq.commands.stopping import AGAIN, Stopped
from squawq.serve.flags import HELP, Command, finish
from squawq.serve.launcher import serve

RESUMABLE = ("quantize", "export", "push")
app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=HELP,
    help="Make Llama-class models small (AWQ INT4), see what is left of them, and run them.",
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version")] = False
) -> None:
    if version:
        print(f"squawq {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command()(quantize)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(chat)
app.command()(run)
app.command()(bench)
app.command()(demo)
app.command(cls=Command)(serve)
app.command()(export)
app.command()(inspect)
app.command()(models)
app.command()(push)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code: 0, 1 when the machine fails, 2 for a misuse, 130 or 143 if stopped."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    words = sys.argv[1:] if arguments is None else arguments
    stopped = f"stopped; {AGAIN}" if words and words[0] in RESUMABLE else "stopped"
    try:
        return finish(app, "squawq", arguments, stopped=stopped)
    except Stopped as stop:
        print(f"squawq: {stop}", file=sys.stderr)
        return stop.code


def entry() -> None:
    """The console script."""
    faulthandler.enable()  # whatever may kill the process, it does not end without a line
    sys.exit(main())
