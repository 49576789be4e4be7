"""What chats and completions share: sampling fields, OpenAI's and vLLM's, with their meaning in either dialect, and
parts of the replies.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from squawq import __version__
from squawq.engine.request import FinishReason, Grammar, Output, Request, SamplingParams, TokenLogprob
from squawq.errors import ConfigError
from squawq.serve.errors import ApiError
from squawq.serve.fields import Body, Count, Many, TokenId
from squawq.serve.http import LazyList, finite_logprob
from squawq.serve.model import SAMPLING_DEFAULTS, Served
from squawq.serve.tools.grammar import response_grammar
from squawq.text.tokenizer import Tokenizer

DONE = "[DONE]"
_SAME = (*SAMPLING_DEFAULTS, "frequency_penalty", "presence_penalty")


class StreamOptions(Body):
    """`usage` in a stream: at its end, or in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # padding against listeners: no text depends on it


class SamplingFields(Body):
    """Fields of both /v1/chat/completions and /v1/completions: OpenAI's, then vLLM's."""

    model: Annotated[str, Field(max_length=1000)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    stop: str | Many[str] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    user: str | None = None
    metadata: Any = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Count = 0
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] = Field([])
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: Literal[True] = True
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    truncation_side: Literal["left", "right"] = "left"
    prompt_logprobs: Annotated[int, Field(ge=0)] | None = None
    allowed_token_ids: Many[TokenId] | None = None
    bad_words: Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=64)] = Field([])
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None  # vLLM's older names of structured_outputs
    guided_regex: str | None = None
    guided_choice: list[Any] | None = None
    guided_grammar: str | None = None
    response_format: dict[str, Any] | None = None
    use_beam_search: Literal[False] = False
    length_penalty: Annotated[float, Field(ge=1, le=1)] = 1
    watermark: Literal[False] = False
    priority: Annotated[int, Field(ge=0, le=0)] = 0
    request_id: Annotated[str, Field(max_length=200)] | None = None
    session_id: Annotated[str, Field(max_length=200)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False

    def prompt_ids(self, text: str, param: str, special: bool, served: Served) -> list[int]:
        """A prompt's token ids, truncated. Raises ApiError for a text that cannot fit."""
        if not self.truncate_prompt_tokens:
            served.prompt_limits.check_text(text, param)
        return self.truncated(served.encode(text, special), served)

    def truncated(self, ids: list[int], served: Served) -> list[int]:
        """A prompt truncated to truncate_prompt_tokens; -1: to the model's limit."""
        keep = self.truncate_prompt_tokens
        if keep is None or keep == 0:
            return ids
        keep = served.max_input if keep == -1 else keep
        return ids[-keep:] if self.truncation_side == "left" else ids[:keep]

    def output_grammar(self, served: Served) -> Grammar | None:
        """The grammar of response_format, structured_outputs or vLLM's older guided_*; None for free text."""
        guided = {name: getattr(self, f"guided_{name}") for name in ("json", "regex", "choice", "grammar")}
        guided = {name: value for name, value in guided.items() if value is not None}
        if guided and self.structured_outputs is not None:
            name = f"guided_{next(iter(guided))}"
            raise ApiError("invalid", f"{name} and structured_outputs are both given; choose one", name)
        outputs = guided or self.structured_outputs
        if self.response_format is None and outputs is None:
            return None
        return response_grammar(self.response_format, outputs, served.added_tokens)

    def check(self, served: Served) -> None:
        """Raise ApiError for rules that concern several fields or settings."""
        settings = served.settings
        served.check_model_name(self.model)
        if self.stream_options is not None and not self.stream and not settings.tgi:
            raise ApiError("invalid", "stream_options needs stream: true", "stream_options")
        if self.n > settings.max_choices:
            raise ApiError("invalid", f"n is {self.n}; at most {settings.max_choices} are made", "n")
        if settings.tgi:
            self._check_tgi(settings.max_stop_sequences)

    def _check_tgi(self, max_stop: int) -> None:
        """TGI's rules that forbid what OpenAI and vLLM allow."""
        stops = 0 if self.stop is None else 1 if isinstance(self.stop, str) else len(self.stop)
        if self.top_p is not None and self.top_p >= 1:
            raise ApiError("invalid", "Input validation error: `top_p` must be > 0.0 and < 1.0", "top_p")
        if stops > max_stop:
            why = f"Input validation error: `stop` supports up to {max_stop} stop sequences. Given: {stops}"
            raise ApiError("invalid", why, "stop")

    def params(
        self,
        served: Served,
        *,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        best_of: int | None = None,
        grammar: Grammar | None = None,
    ) -> SamplingParams:
        """The engine's sampling parameters. Raises ApiError for values out of range."""
        tgi = served.settings.tgi
        given = {name: getattr(self, name) for name in _SAME if getattr(self, name) is not None}
        if tgi and self.presence_penalty is not None:  # what TGI's router makes of it
            given["repetition_penalty"] = self.presence_penalty + 2.0
            del given["presence_penalty"]
        if given.get("top_k") == -1:
            given["top_k"] = 0
        wanted = max((value for value in (logprobs, prompt_logprobs) if value is not None), default=0)
        if wanted > served.settings.max_logprobs:
            raise ApiError("invalid", f"logprobs is {wanted}; at most {served.settings.max_logprobs} are given")
        try:
            return SamplingParams(
                **{**served.sampling_defaults(), **given},
                max_tokens=max_tokens,
                n=self.n,
                best_of=best_of,
                seed=None if self.seed is None else self.seed & (2**63 - 1),
                stop=self.stop or (),
                include_stop=self.include_stop_str_in_output or tgi,
                stop_ids=self.stop_token_ids,
                logit_bias=_bias(self.logit_bias),
                allowed_ids=self.allowed_token_ids,
                bad_ids=_bad_ids(self.bad_words, served),
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                grammar=grammar,
                min_tokens=self.min_tokens,
                ignore_eos=self.ignore_eos,
                skip_special_tokens=self.skip_special_tokens,
            )
        except ConfigError as error:
            raise ApiError("invalid", str(error)) from error


def _bias(values: Mapping[str, float] | None) -> dict[int, float] | None:
    if values is None:
        return None
    bias = {}
    for token, value in values.items():
        if not (token.isascii() and token.isdecimal() and len(token) <= 10):
            raise ApiError("invalid", f"logit_bias has the key {token[:40]!r}; its keys are token ids", "logit_bias")
        bias[int(token)] = value
    return bias


def _bad_ids(words: list[str], served: Served) -> list[list[int]]:
    """A word's tokens at the beginning of a text and after a space, if those differ (as vLLM's bad_words)."""
    sequences = []
    for word in words:
        plain = served.encode(word.lstrip(), special=False)
        spaced = served.encode(" " + word.lstrip(), special=False)
        sequences += [plain] if plain == spaced else [plain, spaced]
    return [ids for ids in sequences if ids]


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class OpenAICall:
    """What chats and completions share (runtime.Call). name: id of the reply; chunk: `object` of a stream's chunks."""

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
        return ApiError("invalid", str(error))

    def end(self) -> list[object]:
        """The usage, if the client asked for it, and the end mark."""
        if not self._usage_at_end:
            return [DONE]
        return [{**self._head(self._chunk_kind), "choices": [], "usage": self._usage()}, DONE]

    def fail(self, error: ApiError) -> list[object]:
        """The error as a chunk, and the end mark."""
        return [error.event(self._tgi), DONE]

    def _head(self, kind: str) -> dict[str, Any]:
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
