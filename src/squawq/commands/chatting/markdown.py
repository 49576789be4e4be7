"""Markdown on a terminal while it is generated: finished blocks are printed once, the last one is drawn anew."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import CodeBlock, Markdown, MarkdownElement
from rich.padding import Padding
from rich.segment import Segment
from rich.syntax import Syntax

from squawq.errors import printable

REDRAWN_S = 0.05  # between two drawings of the last block
CODE_THEME = "ansi_dark"  # the terminal's own colours
# HTML and entities stay as they are written: rich leaves HTML out, and an entity may stand for a control character.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("entity")


class _Code(CodeBlock):
    """A code block without a margin, so that what is copied from the terminal is the code."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(str(self.text).rstrip(), self.lexer_name, theme=self.theme, word_wrap=True)


class _Markdown(Markdown):
    """rich's markdown of a text by PARSER. Addresses of links are shown, since their texts may lie."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {**Markdown.elements, "fence": _Code, "code_block": _Code}

    def __init__(self, text: str) -> None:
        super().__init__("", code_theme=CODE_THEME, hyperlinks=False)
        self.parsed = PARSER.parse(text)


class Block:
    """Markdown without empty lines around it. Control characters are escaped.

    Args:
        text: One block or several.
        last: How many of its last lines to show; None: all.
    """

    def __init__(self, text: str, last: int | None = None) -> None:
        self._text, self._last = printable(text, keep="\n\t"), last

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(_Markdown(self._text), options, pad=False)
        shown = [index for index, line in enumerate(lines) if "".join(segment.text for segment in line).strip()]
        kept = lines[shown[0] : shown[-1] + 1] if shown else []
        for line in kept if self._last is None else kept[-self._last :]:
            yield from line
            yield Segment.line()


def finished_blocks(text: str) -> tuple[list[str], str]:
    """The blocks of a text that later lines cannot change, and the rest: the last block and an unfinished line."""
    whole = text[: text.rfind("\n") + 1]
    starts = [token.map[0] for token in PARSER.parse(whole) if token.level == 0 and token.nesting >= 0 and token.map]
    if len(starts) < 2:
        return [], text
    lines = whole.split("\n")
    blocks = ["\n".join(lines[first:end]) for first, end in pairwise(starts)]
    return blocks, "\n".join(lines[starts[-1] :]) + text[len(whole) :]


class MarkdownStream:
    """Prints markdown that comes in pieces.

    Args:
        console: A terminal that can move its cursor.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rest, self._printed = "", False
        self._live: Live | None = None
        self._drawn = 0.0

    def write(self, piece: str) -> None:
        """Print what the piece finishes, and draw the last block."""
        blocks, self._rest = finished_blocks(self._rest + piece)
        for block in blocks:
            self._print(block)
        if self._rest.strip() and time.monotonic() - self._drawn >= REDRAWN_S:
            self._draw()

    def close(self) -> None:
        """Print the last block as finished."""
        if self._rest.strip():
            self._print(self._rest)
        self._rest = ""
        self._erase()

    def _print(self, block: str) -> None:
        self._erase()
        if self._printed:
            self._console.print()
        self._console.print(Block(block))
        self._printed = True

    def _draw(self) -> None:
        if self._live is None:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
                vertical_overflow="visible",
            )
            self._live.start()
        block = Block(self._rest, last=max(1, self._console.height - 2))  # what has scrolled away cannot be redrawn
        self._live.update(Padding(block, (int(self._printed), 0, 0, 0), expand=False), refresh=True)
        self._drawn = time.monotonic()

    def _erase(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
