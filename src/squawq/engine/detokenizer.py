"""Incremental detokenization (token ids to text, never half a character) and stop strings that span tokens.

The cost of a token does not grow with the length of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

CONTEXT = 8  # tokens before a text that a tokenizer may need to see to spell its beginning
_HELD = 16  # more tokens than this that end in half a character are not going to become one


class TokenDecoder(Protocol):
    """A tokenizer's decode method."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        ...


class TextStream:
    """Turns token ids into text as they come, never half a character.

    `before` are the last ids of what the text follows: some tokenizers drop a space at a text's start. Text is held
    back while it ends in the replacement character, which byte-level tokens give for an unfinished one.
    """

    def __init__(self, tokenizer: TokenDecoder, before: Sequence[int] = (), skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._given = list(before[-CONTEXT:])  # ids whose text has been output, the last piece of them
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes; often empty."""
        self._held.append(token)
        text = self._text(self._held)
        if not text.endswith("\ufffd"):
            return self._emit(len(self._held), text)
        if len(self._held) > _HELD:
            return self._settle(text)
        return ""

    def finish(self) -> str:
        """What was held back."""
        return self._emit(len(self._held), self._text(self._held)) if self._held else ""

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special)

    def _text(self, ids: Sequence[int]) -> str:
        return self._decode([*self._given, *ids])[len(self._decode(self._given)) :]

    def _emit(self, count: int, text: str) -> str:
        piece = (
            self._held[:count] if text else [*self._given, *self._held[:count]][-CONTEXT:]
        )  # special tokens give none
        self._given, self._held = piece, self._held[count:]
        return text

    def _settle(self, text: str) -> str:
        """Output bytes that are no text, but keep the last few: they may begin a character.

        A cut that parts a character shows, since its halves give other text than the whole.
        """
        for cut in range(len(self._held) - 4, len(self._held)):
            head = self._text(self._held[:cut])
            if head + self._decode(self._held[cut:]) == text:
                return self._emit(cut, head)
        return self._emit(len(self._held), text)


class StopStrings:
    """Cuts a text at the first of some strings to be complete; of several complete at one character, the longest.

    Text that may begin one is held back, unless it stays in the text anyway. Where the text is split does not matter.
    The automaton is Knuth, Morris and Pratt's (SIAM J. Comput. 6, 1977), one a string.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._states = [0] * len(stops)  # how many characters of each string the text ends with
        self._include = include
        self._held = ""

    def push(self, text: str, ending: bool = True) -> tuple[str, str | None]:
        """The text that can be output, and the stop string if one was found; nothing may be pushed after that.

        ending: False passes over strings that become complete in this text.
        """
        if not self._stops:
            return text, None
        buffer = self._held + text
        for position in range(len(self._held), len(buffer)):
            if (stop := self._advance(buffer[position])) is not None and ending:
                self._held = ""
                return buffer[: position + 1 - (0 if self._include else len(stop))], stop
        ready = len(buffer) if self._include else len(buffer) - max(self._states)
        self._held = buffer[ready:]
        return buffer[:ready], None

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        found = None
        for index, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            state = self._states[index]
            while state and stop[state] != character:
                state = borders[state - 1]
            state += stop[state] == character
            if state == len(stop):
                found = found or stop
                state = borders[-1]
            self._states[index] = state
        return found


def _borders(word: str) -> list[int]:
    """For each beginning of a word, the length of the longest shorter beginning that it also ends with."""
    borders = [0] * len(word)
    length = 0
    for position in range(1, len(word)):
        while length and word[position] != word[length]:
            length = borders[length - 1]
        length += word[position] == word[length]
        borders[position] = length
    return borders
