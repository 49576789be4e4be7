"""The sampling fields of OpenAI's chat and completion bodies, with vLLM's, and their meaning in either dialect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from squawq.engine.request import Grammar, SamplingParams
from squawq.errors import ConfigError
from squawq.serve.errors import ApiError
from squawq.serve.fields import Body, Count, Many, TokenId
from squawq.serve.model import Served


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

    def outputs(self) -> dict[str, Any] | None:
        """structured_outputs, or vLLM's older guided_* fields. Raises ApiError if both are given."""
        guided = {name: getattr(self, f"guided_{name}") for name in ("json", "regex", "choice", "grammar")}
        guided = {name: value for name, value in guided.items() if value is not None}
        if guided and self.structured_outputs is not None:
            name = f"guided_{next(iter(guided))}"
            raise ApiError("invalid", f"{name} and structured_outputs are both given; choose one", name)
        return guided or self.structured_outputs

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
            raise ApiError(
                "invalid",
                f"Input validation error: `stop` supports up to {max_stop} stop sequences. Given: {stops}",
                "stop",
            )

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
        base = SamplingParams(temperature=1.0) if tgi else served.defaults
        given = {name: getattr(self, name) for name in _SAME if getattr(self, name) is not None}
        if tgi and self.presence_penalty is not None:  # what TGI's router makes of it
            given["repetition_penalty"] = self.presence_penalty + 2.0
            del given["presence_penalty"]
        if given.get("top_k") == -1:
            given["top_k"] = 0
        sampling = {name: getattr(base, name) for name in _DEFAULTED}
        wanted = max((value for value in (logprobs, prompt_logprobs) if value is not None), default=0)
        if wanted > served.settings.max_logprobs:
            raise ApiError("invalid", f"logprobs is {wanted}; at most {served.settings.max_logprobs} are given")
        try:
            return SamplingParams(
                **{**sampling, **given},
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


_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")
_SAME = (*_DEFAULTED, "frequency_penalty", "presence_penalty")


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
