"""What certainly does not fit the context, by its size: refused before it is rendered or tokenized.

A text of more bytes than the context's tokens can stand for never fits. That is exact for byte-level tokenizers; one
that normalizes, strips or drops characters may read more, so its bound is LOOSE times as far away. So is the bound of a
chat's contents, of which its template may leave out some. A chat with more messages than the context has tokens is
refused too, whatever its template would leave of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from squawq.serve.errors import ApiError
from squawq.text.tokenizer import Tokenizer

LOOSE = 4  # NFC composes four characters into one at most
_BYTES = 256


class Sizes:
    """The sizes that may fit a context of `max_len` tokens, of which a prompt may have `max_input`."""

    def __init__(self, tokenizer: Tokenizer, max_len: int, max_input: int) -> None:
        self._max_len, self._max_input = max_len, max_input
        self.max_bytes = max_input * longest_token(tokenizer)
        self._max_contents = max_input * LOOSE * _longest_piece(tokenizer)

    def check_text(self, text: str, param: str) -> None:
        """Raise ApiError for a text that cannot fit."""
        self._check_bytes([text], self.max_bytes, param)

    def check_messages(self, messages: object, *, truncated: bool = False) -> None:
        """Raise ApiError for messages as they came that cannot fit, by their number and (unless the prompt is to be
        truncated) by the texts of their contents."""
        if not isinstance(messages, list):
            return
        if len(messages) > self._max_input:
            raise ApiError(
                "invalid", f"{self._context()}; this one has {len(messages)} messages. Shorten it.", "messages"
            )
        if not truncated:
            self._check_bytes([*_texts(messages)], self._max_contents, "messages")

    def _check_bytes(self, texts: Sequence[str], most: int, param: str) -> None:
        if sum(map(len, texts)) * 4 <= most:
            return
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        if size > most:
            raise ApiError(
                "invalid",
                f"{self._context()}; this one has {size} bytes of text, and {self._max_input} tokens stand for "
                f"{most} at most. Shorten it.",
                param,
            )

    def _context(self) -> str:
        return (
            f"This model's maximum context length is {self._max_len} tokens, of which a prompt may have "
            f"{self._max_input}"
        )


def _texts(messages: Sequence[Any]) -> Iterator[str]:
    """The texts of contents and their parts."""
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text


def longest_token(tokenizer: Tokenizer) -> int:
    """Bytes of a text that one token stands for, at most."""
    fast = tokenizer.fast
    steps = list(_steps(fast.pre_tokenizer))
    added = fast.get_added_tokens_decoder().values()
    exact = (
        any(step["type"] == "ByteLevel" for step in steps)
        and sum(len(piece) == 1 for piece in fast.get_vocab(with_added_tokens=False)) >= _BYTES  # no byte is dropped
        and fast.normalizer is None
        and not any(step.get("behavior") == "Removed" for step in steps)
        and not any(token.lstrip or token.rstrip for token in added)  # which take in any number of spaces
    )
    return _longest_piece(tokenizer) * (1 if exact else LOOSE)


def _longest_piece(tokenizer: Tokenizer) -> int:
    """Bytes of the vocabulary's longest token."""
    fast = tokenizer.fast
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(fast.pre_tokenizer))
    lengths = [len(piece) if byte_level else len(piece.encode()) for piece in fast.get_vocab(with_added_tokens=False)]
    added = (len(token.content.encode()) for token in fast.get_added_tokens_decoder().values())
    return max([*lengths, *added], default=1)


def _steps(pre_tokenizer: Any) -> Iterator[dict[str, Any]]:
    if pre_tokenizer is not None:
        state = json.loads(pre_tokenizer.__getstate__())
        yield from state.get("pretokenizers", [state])
