"""Prints an answer while it is generated: as markdown, as plain text, or as it is for a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.text import Text

from squawq.commands.chatting.markdown import MarkdownStream
from squawq.commands.chatting.reasoning import Part, ReasoningSplitter
from squawq.engine.request import FinishReason, Output
from squawq.errors import printable


class View(Protocol):
    """Where an answer is printed."""

    def write(self, piece: str, parts: Sequence[Part]) -> None:
        """Print a piece of the answer: as it was generated, and as its parts."""

    def close(self) -> None:
        """End the answer, however it ended."""


class PlainView:
    """stdout as it comes, reasoning with its tags. On a terminal control characters are escaped."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()

    def write(self, piece: str, parts: Sequence[Part]) -> None:  # noqa: ARG002
        sys.stdout.write(printable(piece, keep="\n\t") if self._terminal else piece)
        sys.stdout.flush()

    def close(self) -> None:
        sys.stdout.write("\n")
        sys.stdout.flush()


class TerminalView:
    """A terminal: reasoning dimmed, then the answer, as markdown if `markdown` is set."""

    def __init__(self, console: Console, markdown: bool) -> None:
        self._console = console
        self._markdown = MarkdownStream(console) if markdown else None
        self._reasoned, self._space = False, ""

    def write(self, piece: str, parts: Sequence[Part]) -> None:  # noqa: ARG002
        for reasoning, text in parts:
            if reasoning:
                self._write_reasoning(text)
                continue
            if self._reasoned:
                self._console.print("\n")
                self._reasoned = False
            if self._markdown is None:
                self._print(text)
            else:
                self._markdown.write(text)

    def close(self) -> None:
        if self._markdown is not None:
            self._markdown.close()
        if self._reasoned or self._markdown is None:
            self._console.print()

    def _write_reasoning(self, text: str) -> None:
        """Space is printed once something follows it."""
        text = self._space + text if self._reasoned else text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._print(shown, "dim")
            self._reasoned = True

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(Text(printable(text, keep="\n\t"), style, end=""), end="", soft_wrap=True)


def view(plain: bool) -> View:
    """How this process's stdout shows an answer."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal or console.is_dumb_terminal:
        return PlainView()
    return TerminalView(console, markdown=not plain)


@dataclass
class Answer:
    """What has been generated so far.

    Attributes:
        text: Without reasoning, which chat templates leave out of later prompts.
        tokens: Reasoning included.
        seconds: From the first token to the last.
        cut: It ended at max_tokens or at the end of the context.
    """

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    cut: bool = False
    stopped: bool = False

    def summary(self, prompt_tokens: int, context: int) -> str:
        """Tokens, tokens per second after the first one, and the context in use."""
        count = "1 token" if self.tokens == 1 else f"{self.tokens:,} tokens"
        speed = f", {(self.tokens - 1) / self.seconds:,.1f} tokens/s" if self.tokens > 1 and self.seconds else ""
        ending = ", stopped by Ctrl-C" if self.stopped else ", cut off by max_tokens or the context" if self.cut else ""
        return f"{count}{speed}, context {prompt_tokens + self.tokens:,} of {context:,}{ending}"


def print_answer(outputs: Generator[Output], shown: View, *, reasoning: bool) -> Answer:
    """Print an answer until it ends or Ctrl-C stops it, and return it.

    Args:
        outputs: Of one sequence; closed at the end.
        reasoning: The prompt ends with <think>.
    """
    answer, splitter, first = Answer(), ReasoningSplitter(reasoning), 0.0
    try:
        for output in outputs:
            now = time.perf_counter()
            first = first or now
            answer.tokens += len(output.ids)
            answer.seconds = now - first
            answer.cut = output.finish == FinishReason.LENGTH
            parts = [*splitter.push(output.text), *(splitter.finish() if output.finish else [])]
            answer.text += "".join(text for is_reasoning, text in parts if not is_reasoning)
            shown.write(output.text, parts)
    except KeyboardInterrupt:
        answer.stopped = True
    finally:
        outputs.close()
        shown.close()
    return answer
