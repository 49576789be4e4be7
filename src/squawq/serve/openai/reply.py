"""Replies of OpenAI's routes: what chats and completions share, and log probabilities as OpenAI and vLLM write them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from squawq import __version__
from squawq.engine.request import FinishReason, Output, Request, TokenLogprob
from squawq.errors import ConfigError
from squawq.serve.call import LazyList, dump, finite_logprob
from squawq.serve.errors import ApiError
from squawq.serve.model import Served
from squawq.serve.openai.sampling import SamplingFields
from squawq.text.tokenizer import TextStream, Tokenizer

DONE = "[DONE]"


def usage(prompt: int, completion: int) -> dict[str, int]:
    """OpenAI's `usage` object."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class OpenAICall:
    """What chats and completions share (call.Call).

    Args:
        body: The request's fields.
        served: The model.
        requests: For the engine.
        name: Id of the reply.
        chunk: `object` of a stream's chunks.
    """

    def __init__(
        self, body: SamplingFields, served: Served, requests: Sequence[Request], name: str, chunk: str
    ) -> None:
        self.requests = requests
        self.stream = body.stream
        self.headers: Mapping[str, str] = {}
        self._served = served
        self._tgi = served.settings.tgi
        self._formatter = LogprobFormatter(served.tokenizer, body.return_tokens_as_token_ids)
        self._model = served.reply_model_name(body.model)
        self._created = int(time.time())
        self._name, self._chunk_kind = name, chunk
        options = body.stream_options
        self._usage_at_end = options is not None and options.include_usage
        self._usage_in_chunks = options is not None and options.continuous_usage_stats
        self._tokens = 0

    def invalid(self, error: ConfigError) -> ApiError:
        """The engine's message."""
        return ApiError("invalid", str(error))

    def end(self) -> list[str]:
        """The usage, if the client asked for it, and the end mark."""
        if not self._usage_at_end:
            return [DONE]
        return [dump({**self._head(self._chunk_kind), "choices": [], "usage": self._usage()}), DONE]

    def fail(self, error: ApiError) -> list[str]:
        """The error as a chunk, and the end mark."""
        return [dump(error.event(self._tgi)), DONE]

    def _head(self, kind: str) -> dict[str, Any]:
        """The first fields of a reply or chunk."""
        head = {"id": self._name, "object": kind, "created": self._created, "model": self._model}
        return {**head, "system_fingerprint": f"squawq-{__version__}"}

    def _usage(self) -> dict[str, int]:
        return usage(sum(len(request.prompt) for request in self.requests), self._tokens)

    def _finish_reason(self, output: Output) -> str | None:
        """OpenAI's finish_reason, or TGI's."""
        if self._tgi and output.finish is FinishReason.STOP and output.stop_reason not in self._served.eos_ids:
            return "stop_sequence"
        return output.finish and output.finish.value

    def _stop_reason(self, output: Output) -> str | int | None:
        """The stop string or id; None for the model's end token."""
        return None if output.stop_reason in self._served.eos_ids else output.stop_reason


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
