"""Separates a reasoning model's reasoning, between <think> and </think>, from its answer, while both are generated."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"
Part = tuple[bool, str]  # whether it is reasoning, and its text without the tags


class ReasoningSplitter:
    """Splits an answer that comes in pieces. A tag counts at the answer's beginning only, and may be cut by pieces.

    Args:
        begun: The prompt ends with <think>, so the answer begins with reasoning.
    """

    def __init__(self, begun: bool = False) -> None:
        self._state = "reasoning" if begun else "start"
        self._held = ""  # text that may be the beginning of a tag, or space before an answer

    def push(self, piece: str) -> list[Part]:
        """The parts that this piece completes."""
        text, parts = self._held + piece, []
        self._held = ""
        if self._state == "start":
            begin = text.lstrip()
            if len(begin) < len(OPEN) and OPEN.startswith(begin):
                self._held = text
                return []
            if begin.startswith(OPEN):
                self._state, text = "reasoning", begin.removeprefix(OPEN)
            else:
                self._state = "answer"
        if self._state == "reasoning":
            reasoning, close, text = text.partition(CLOSE)
            if close:
                self._state = "after"
            else:
                self._held = _beginning_of(CLOSE, reasoning)
                reasoning = reasoning.removesuffix(self._held)
            parts.append((True, reasoning))
        if self._state == "after":
            text = text.lstrip()
            if text:
                self._state = "answer"
        if self._state == "answer":
            parts.append((False, text))
        return [part for part in parts if part[1]]

    def finish(self) -> list[Part]:
        """What was held back, at the answer's end."""
        held, self._held = self._held, ""
        return [(self._state == "reasoning", held)] if held else []


def _beginning_of(tag: str, text: str) -> str:
    """The longest end of a text with which the tag may begin."""
    return next((tag[:count] for count in range(len(tag) - 1, 0, -1) if text.endswith(tag[:count])), "")
