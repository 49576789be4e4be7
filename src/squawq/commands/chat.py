"""`squawq chat`: a conversation. A terminal gets line editing, history and multi-line paste; a pipe is read by lines.

Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterable
from typing import Annotated, Any

import typer

from squawq.commands.generate import load, sampling, write
from squawq.commands.options import (
    Device,
    Dtype,
    Exact,
    Head,
    KvCacheDtype,
    MaxTokens,
    Model,
    Seed,
    Temperature,
    TensorParallelSize,
    Threads,
)
from squawq.errors import ConfigError
from squawq.progress import console

KEYS = "Enter sends, Alt-Enter begins a new line, arrows edit and go back in the history."
LEAVING = "/new starts over; /exit or Ctrl-D ends."


def chat(
    model: Model,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling, above 0 to 1")] = None,
    system: Annotated[str | None, typer.Option(help="A system message")] = None,
    seed: Seed = None,
    device: Device = "auto",
    threads: Threads = None,
    tensor_parallel_size: TensorParallelSize = 1,
    exact: Exact = False,
    head: Head = None,
    dtype: Dtype = "auto",
    kv_cache_dtype: KvCacheDtype = "auto",
) -> None:
    """Talk to a model. Ctrl-C stops an answer; /new starts over, /exit or Ctrl-D ends. Pipes work: a line, an answer.

    \b
    Example:
      squawq chat OUT --system "You are a friendly storyteller."
    """
    knobs = {"device": device, "dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "head": head}
    llm = load(model, threads=threads, tensor_parallel_size=tensor_parallel_size, exact=exact, **knobs)
    settings = sampling(llm, max_tokens, temperature, top_p, seed)
    start = [{"role": "system", "content": system}] if system else []
    llm.tokenizer.render([*start, {"role": "user", "content": "hello"}])  # a model without a template ends here
    if sys.stdin.isatty() and sys.stderr.isatty():
        console.print(banner(llm), markup=False)
        _talk(llm, settings, start, _messages(_editor()))
    else:
        _talk(llm, settings, start, _messages(lambda: console.input("[bold]> [/bold]"), stops=True))


def banner(llm: Any) -> str:
    """The model and the keys."""
    model = repr(llm).strip("<>").removeprefix("squawq.LLM ")
    return f"squawq chat with {model}\n{KEYS}\nCtrl-C stops an answer. {LEAVING}"


def _talk(llm: Any, settings: Any, start: list[dict[str, str]], texts: Iterable[str]) -> None:
    """Answer each message; a stopped answer stays in the conversation."""
    messages = list(start)
    for text in texts:
        if text == "/new":
            messages = list(start)
            continue
        question = [*messages, {"role": "user", "content": text}]
        written: list[str] = []
        try:
            write(_kept(llm.stream_chat(question, settings), written))
        except ConfigError as error:
            console.print(f"{error}; /new starts over", style="red", markup=False)
            continue
        except KeyboardInterrupt:
            console.print("(stopped)", markup=False)
        messages = [*question, {"role": "assistant", "content": "".join(written)}]


def _kept(pieces: Generator[str], kept: list[str]) -> Generator[str]:
    try:
        for piece in pieces:
            kept.append(piece)
            yield piece
    finally:
        pieces.close()


def _messages(read: Callable[[], str], stops: bool = False) -> Generator[str]:
    """The user's messages, up to /exit or the end of input; with `stops` Ctrl-C ends it, too."""
    while True:
        try:
            text = read().strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            if stops:
                raise
            console.print(f"Ctrl-C stops an answer, and there is none now. {LEAVING}", markup=False)
            continue
        if text == "/exit":
            return
        if text:
            yield text


def _editor() -> Callable[[], str]:
    """A prompt with line editing and the history of this conversation; it takes pasted lines as one text."""
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")  # terminals need not say where the cursor is
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.key_binding.key_processor import KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession("> ", key_bindings=keys, output=create_output(sys.stderr))
    return session.prompt
