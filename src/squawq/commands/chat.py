"""`squawq chat`: a conversation. A terminal gets line editing, history and multi-line paste; a pipe is read by lines.

Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from squawq.commands.generate import load, sampling
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
from squawq.progress import console


def chat(
    model: Model,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    system: Annotated[str | None, typer.Option(help="A system message")] = None,
    seed: Seed = None,
    plain: Annotated[bool, typer.Option("--plain", help="Print answers as text, not as markdown")] = False,
    history: Annotated[bool, typer.Option(help="Keep what is typed for the next time, for this user alone")] = True,
    device: Device = "auto",
    model_impl: ModelImpl = "auto",
    threads: Threads = None,
    tensor_parallel_size: TensorParallelSize = 1,
    exact: Exact = False,
    head: Head = None,
    dtype: Dtype = "auto",
    kv_cache_dtype: KvCacheDtype = "auto",
) -> None:
    """Talk to a model. Ctrl-C stops an answer; /help lists commands. Pipes work: a line, an answer.

    \b
    Examples:
      squawq chat OUT
      squawq chat OUT --system "You are a friendly storyteller." --temperature 0.7
      squawq chat OUT --plain --no-history
      squawq chat OUT --model-impl transformers
    """
    from squawq.commands.chatting.conversation import Conversation
    from squawq.commands.chatting.talk import greet, talk

    knobs = {"device": device, "dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "head": head, "model_impl": model_impl}
    llm = load(model, threads=threads, tensor_parallel_size=tensor_parallel_size, exact=exact, **knobs)
    conversation = Conversation(sampling(llm, max_tokens, temperature, top_p, seed))
    conversation.system = system
    llm.tokenizer.render(conversation.asking("hello"))  # a model without a template ends here
    if sys.stdin.isatty() and sys.stderr.isatty():
        from squawq.commands.chatting.editor import editor

        greet(llm)
        talk(llm, conversation, editor(history), plain)
    else:
        prompt = "[bold]> [/bold]" if sys.stdin.isatty() else ""  # a pipe needs none
        talk(llm, conversation, lambda _: console.input(prompt), plain, interactive=False)
