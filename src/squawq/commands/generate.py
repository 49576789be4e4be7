"""`squawq generate`: text to stdout as it comes, everything else to stderr; and what `squawq chat` shares with it."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import closing
from typing import Annotated, Any

import typer
from rich.markup import escape

from squawq.commands.options import (
    Device,
    Dtype,
    Exact,
    Head,
    KvCacheDtype,
    MaxTokens,
    Model,
    ModelImpl,
    Seed,
    Temperature,
    TensorParallelSize,
    Threads,
    TopP,
)
from squawq.errors import printable
from squawq.progress import console


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The prompt")],
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    device: Device = "auto",
    model_impl: ModelImpl = "auto",
    threads: Threads = None,
    tensor_parallel_size: TensorParallelSize = 1,
    exact: Exact = False,
    head: Head = None,
    dtype: Dtype = "auto",
    kv_cache_dtype: KvCacheDtype = "auto",
) -> None:
    """Continue a text: the continuation on stdout, everything else on stderr.

    \b
    Examples:
      squawq generate OUT -p "Once upon a time" --max-tokens 100 --temperature 0
      squawq generate OUT -p "Once upon a time" --device cpu
      squawq generate OUT -p "Once upon a time" --model-impl transformers
    """
    knobs = {"device": device, "dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "head": head, "model_impl": model_impl}
    llm = load(model, threads=threads, tensor_parallel_size=tensor_parallel_size, exact=exact, **knobs)
    write(llm.stream(prompt, sampling(llm, max_tokens, temperature, top_p, seed)))


def load(model: str, **options: Any) -> Any:
    """The model, with a word on stderr while it loads."""
    from squawq.llm import LLM

    with console.status(escape(printable(f"loading {model}"))):
        return LLM(model, **options)


def sampling(llm: Any, max_tokens: int, temperature: float | None, top_p: float | None, seed: int | None) -> Any:
    """The model's own sampling settings, and what was asked for."""
    from dataclasses import replace

    given = {"temperature": temperature, "top_p": top_p, "seed": seed}
    return replace(llm.sampling_defaults(), max_tokens=max_tokens, **{k: v for k, v in given.items() if v is not None})


def write(pieces: Generator[str]) -> None:
    """Pieces to stdout as they come, and a line's end, however they end; stops the work behind them.

    What would steer a terminal is escaped there; a pipe gets the text as it is.
    """
    terminal = sys.stdout.isatty()
    with closing(pieces):
        try:
            for piece in pieces:
                sys.stdout.write(printable(piece, keep="\n\t") if terminal else piece)
                sys.stdout.flush()
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()
