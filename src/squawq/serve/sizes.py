"""What certainly does not fit the context, by its size: refused before it is rendered or tokenized.

A text of more bytes than the context's tokens can stand for never fits. That is exact for byte-level tokenizers; one
that normalizes, strips or drops characters may read more, so its bound is LOOSE times as far away. A chat with more
messages than the context has tokens is refused too, whatever its template would leave of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from squawq.serve.errors import ApiError
from squawq.tokenizer import Tokenizer

LOOSE = 4  # NFC composes four characters into one at most
_BYTES = 256


class Sizes:
    """The sizes that may fit a context of `max_len` tokens, of which a prompt may have `max_input`."""

    def __init__(self, tokenizer: Tokenizer, max_len: int, max_input: int) -> None:
        self._max_len, self._max_input = max_len, max_input
        self._longest = longest_token(tokenizer)
        self.max_bytes = max_input * self._longest

    def check_text(self, text: str, param: str) -> None:
        """Raise ApiError for a text that cannot fit."""
        if len(text) * 4 <= self.max_bytes:
            return
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > self.max_bytes:
            raise ApiError(
                "invalid",
                f"{self._context()}; this one has {size} bytes of text, and {self._max_input} tokens stand for "
                f"{self.max_bytes} at most. Shorten it.",
                param,
            )

    def check_messages(self, messages: object) -> None:
        """Raise ApiError for more messages than the context has tokens."""
        if isinstance(messages, list) and len(messages) > self._max_input:
            raise ApiError(
                "invalid", f"{self._context()}; this one has {len(messages)} messages. Shorten it.", "messages"
            )

    def _context(self) -> str:
        return (
            f"This model's maximum context length is {self._max_len} tokens, of which a prompt may have "
            f"{self._max_input}"
        )


def longest_token(tokenizer: Tokenizer) -> int:
    """Bytes of a text that one token stands for, at most."""
    fast = tokenizer.fast
    added = fast.get_added_tokens_decoder().values()
    vocabulary = fast.get_vocab(with_added_tokens=False)
    steps = list(_steps(fast.pre_tokenizer))
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    lengths = [len(piece) if byte_level else len(piece.encode()) for piece in vocabulary]
    longest = max([*lengths, *(len(token.content.encode()) for token in added)], default=1)
    exact = (
        byte_level
        and sum(len(piece) == 1 for piece in vocabulary) >= _BYTES  # no byte is dropped
        and fast.normalizer is None
        and not any(step.get("behavior") == "Removed" for step in steps)
        and not any(token.lstrip or token.rstrip for token in added)  # which take in any number of spaces
    )
    return longest if exact else LOOSE * longest


def _steps(pre_tokenizer: Any) -> Iterator[dict[str, Any]]:
    if pre_tokenizer is not None:
        state = json.loads(pre_tokenizer.__getstate__())
        yield from state.get("pretokenizers", [state])
