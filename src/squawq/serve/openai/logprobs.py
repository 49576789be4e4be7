"""Log probabilities in OpenAI's chat and completion formats, and vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from squawq.engine.request import TokenLogprob
from squawq.engine.text import TextStream
from squawq.serve.call import LazyList, finite_logprob
from squawq.tokenizer import Tokenizer


@dataclass(frozen=True)
class LogprobFormatter:
    """Writes tokens and their log probabilities. as_ids: as "token_id:7", which is unique, instead of their text."""

    tokenizer: Tokenizer
    as_ids: bool = False
    _names: dict[int, str] = field(default_factory=dict, init=False, repr=False)

    def text(self, token: int) -> str:
        """A token's text, with its leading space, which decoding it alone may drop."""
        if token not in self._names:
            text = self.tokenizer.token_bytes(token).decode("utf-8", "replace")
            self._names[token] = f"token_id:{token}" if self.as_ids else text
        return self._names[token]

    def chat(self, items: Sequence[TokenLogprob]) -> dict[str, Any]:
        """OpenAI's chat format."""
        return {"content": LazyList(self._scored, items)}

    def completion(
        self, items: Sequence[TokenLogprob | None], ids: Sequence[int], offsets: Sequence[int]
    ) -> dict[str, Any]:
        """OpenAI's completion format for tokens at `offsets` in the text. None: no log probability."""
        return {
            "text_offset": list(offsets),
            "token_logprobs": [None if item is None else finite_logprob(item.logprob) for item in items],
            "tokens": [self.text(token) for token in ids],
            "top_logprobs": LazyList(self._top, items),
        }

    def prompt(self, items: Sequence[TokenLogprob | None]) -> LazyList[TokenLogprob | None]:
        """vLLM's prompt_logprobs: for each prompt token, its own log probability and the top ones, by id."""
        return LazyList(self._ranked, items)

    def _ranked(self, item: TokenLogprob | None) -> dict[str, Any] | None:
        if item is None:
            return None
        pairs: dict[int, tuple[float, int | None]] = {item.token: (item.logprob, None)}
        pairs |= {token: (logprob, rank) for rank, (token, logprob) in enumerate(item.top, 1)}
        return {
            str(token): {"logprob": finite_logprob(logprob), "rank": rank, "decoded_token": self.text(token)}
            for token, (logprob, rank) in pairs.items()
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self.tokenizer.token_bytes(token)
        return {"token": self.text(token), "logprob": finite_logprob(logprob), "bytes": list(spelled)}

    def _scored(self, item: TokenLogprob) -> dict[str, Any]:
        return {**self._entry(item.token, item.logprob), "top_logprobs": [self._entry(*pair) for pair in item.top]}

    def _top(self, item: TokenLogprob | None) -> dict[str, float] | None:
        """The top tokens, best first, and always the token itself, as in OpenAI's replies."""
        if item is None:
            return None
        top: dict[str, float] = {}
        for token, logprob in (*item.top, (item.token, item.logprob)):
            top.setdefault(self.text(token), finite_logprob(logprob))
        return top


class Offsets:
    """Character offsets of tokens in the text.

    A token without text, such as a begin token, has the next one's offset; all tokens of a character have its offset.
    """

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self._at = 0

    def take(self, ids: Sequence[int]) -> list[int]:
        """The offsets of the next tokens."""
        places = []
        for token in ids:
            places.append(self._at)
            self._at += len(self._stream.push(token))
        return places
