"""`squawq generate` and `squawq chat`: text to stdout as it comes, everything else to stderr."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import closing
from typing import Annotated, Any

import typer
from rich.markup import escape

from squawq.commands.options import Device, Exact, Head, MaxTokens, Model, Seed, Temperature, Threads
from squawq.errors import ConfigError, printable
from squawq.progress import console


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to go on from")],
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling, above 0 to 1")] = None,
    seed: Seed = None,
    device: Device = "cpu",
    threads: Threads = None,
    exact: Exact = False,
    head: Head = None,
) -> None:
    """Continue a text: the continuation on stdout, everything else on stderr.

    \b
    Example:
      squawq generate OUT -p "Once upon a time" --max-tokens 100 --temperature 0
    """
    llm = _load(model, device=device, threads=threads, exact=exact, head=head)
    _write(llm.stream(prompt, _sampling(llm, max_tokens, temperature, top_p, seed)))


def chat(
    model: Model,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling, above 0 to 1")] = None,
    system: Annotated[str | None, typer.Option(help="A system message")] = None,
    seed: Seed = None,
    device: Device = "cpu",
    threads: Threads = None,
    exact: Exact = False,
    head: Head = None,
) -> None:
    """Talk to a model. An empty line is ignored; /new starts over, /exit or Ctrl-D ends.

    Example: squawq chat OUT --system "You are a friendly storyteller."
    """
    llm = _load(model, device=device, threads=threads, exact=exact, head=head)
    sampling = _sampling(llm, max_tokens, temperature, top_p, seed)
    start = [{"role": "system", "content": system}] if system else []
    llm.tokenizer.render([*start, {"role": "user", "content": "hello"}])  # a model without a template ends here
    messages = list(start)
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except EOFError:
            console.print()
            return
        if line == "/exit":
            return
        if line == "/new":
            messages = list(start)
        elif line:
            question = [*messages, {"role": "user", "content": line}]
            try:
                answer = _write(llm.stream_chat(question, sampling))
            except ConfigError as error:
                console.print(f"{error}; /new starts over", style="red")
                continue
            except KeyboardInterrupt:
                console.print("\n(stopped)")
                continue
            messages = [*question, {"role": "assistant", "content": answer}]


def _load(model: str, **options: Any) -> Any:
    from squawq.llm import LLM

    with console.status(escape(printable(f"loading {model}"))):
        return LLM(model, **options)


def _sampling(llm: Any, max_tokens: int, temperature: float | None, top_p: float | None, seed: int | None) -> Any:
    from dataclasses import replace

    given = {"temperature": temperature, "top_p": top_p, "seed": seed}
    return replace(llm.sampling_defaults(), max_tokens=max_tokens, **{k: v for k, v in given.items() if v is not None})


def _write(pieces: Generator[str]) -> str:
    """Pieces to stdout as they come; returns the whole. Interrupted, it stops the work behind them.

    What would steer a terminal is escaped there; a pipe gets the text as it is.
    """
    written, terminal = [], sys.stdout.isatty()
    with closing(pieces):
        for piece in pieces:
            sys.stdout.write(printable(piece, keep="\n\t") if terminal else piece)
            sys.stdout.flush()
            written.append(piece)
    sys.stdout.write("\n")
    return "".join(written)
