"""/v1/completions, /tokenize, /detokenize and /tokenizer_info, as vLLM has them.

Prompts are texts, lists of texts, token ids or lists of those. echo and logprobs are as lm-evaluation-harness reads
them: one entry per token, the first null, and no token added to ids. TGI's /tokenize (key `inputs`) is in tgi/.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import Field

from squawq.engine.request import Output, Request, TokenLogprob
from squawq.serve.errors import ApiError
from squawq.serve.fields import Body, Many, TokenId, validate
from squawq.serve.metrics import Timing
from squawq.serve.model import Served
from squawq.serve.openai.base import OpenAICall, SamplingFields, usage
from squawq.serve.openai.chat import ChatBody, read, render
from squawq.serve.runtime import Reply
from squawq.text.tokenizer import TextStream

DEFAULT_MAX_TOKENS = 16  # OpenAI's and vLLM's; TGI fills the context
MAX_LOOKED_AT = 4096  # prompts that are looked at; how many are taken is a setting
Ids = Annotated[Many[TokenId], Field(min_length=1)]
Prompt = TypeVar("Prompt")
Prompts = Annotated[Many[Prompt], Field(min_length=1, max_length=MAX_LOOKED_AT)]


class CompletionBody(SamplingFields):
    """The body of /v1/completions."""

    prompt: str | Ids | Prompts[str] | Prompts[Ids]
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: str | None = None
    add_special_tokens: bool = True

    def prompts(self, served: Served) -> list[list[int]]:
        """Token ids of every prompt. Raises ApiError for too many prompts."""
        given: Sequence[str | list[int]]
        given = [self.prompt] if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt
        settings = served.settings
        most = settings.max_client_batch if settings.tgi else settings.max_prompts
        if len(given) * max(self.n, self.best_of or 1) > max(most, settings.max_choices) or len(given) > most:
            message = f"Number of prompts exceeds the maximum allowed batch size of {most}"
            if len(given) <= most:
                message = f"prompts times n (or best_of) exceed {max(most, settings.max_choices)}"
            raise ApiError("batch", message, "prompt")
        return [
            self.prompt_ids(item, "prompt", self.add_special_tokens, served)
            if isinstance(item, str)
            else self.truncated(item, served)
            for item in given
        ]

    def limit_by_logprobs(self, served: Served, prompts: list[list[int]], tokens: int) -> int:
        """New tokens of a sequence within the limit of log probabilities. Raises ApiError."""
        shown = 0 if self.logprobs is None else self.logprobs + 1
        listed = (self.n * shown if self.echo else 0) + (
            0 if self.prompt_logprobs is None else self.prompt_logprobs + 1
        )
        return served.limit_by_logprobs(
            sum(map(len, prompts)) * listed,
            len(prompts) * max(self.n, self.best_of or 1) * shown,
            tokens,
            asked=self.max_tokens is not None or not served.settings.tgi,
        )

    def check(self, served: Served) -> None:
        super().check(served)
        if self.suffix is not None:
            raise ApiError(
                "suffix", "Suffix is not supported and can be achieved by preprocessing the prompt.", "suffix"
            )
        if self.best_of is not None and self.best_of < self.n:
            raise ApiError("invalid", f"best_of is {self.best_of}; it must be at least n, which is {self.n}", "best_of")
        if self.best_of is not None and self.best_of > served.settings.max_choices:
            raise ApiError("invalid", f"best_of is {self.best_of}; at most {served.settings.max_choices}", "best_of")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise ApiError("invalid", "best_of above n cannot be streamed", "best_of")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError("invalid", "max_tokens is 0, which makes sense with echo alone", "max_tokens")


def completion(raw: Mapping[str, Any], served: Served, tenant: str = "") -> CompletionCall:
    """Parse a completion request. Raises ApiError."""
    body = validate(CompletionBody, raw, strict=served.settings.strict_fields)
    body.check(served)
    grammar = body.output_grammar(served)
    served.check_grammar(grammar)
    scored = body.logprobs if body.echo else None
    if body.prompt_logprobs is not None:
        scored = max(body.prompt_logprobs, scored or 0)
    name, requests, prompts = f"cmpl-{uuid.uuid4().hex}", [], body.prompts(served)
    limits = [served.max_new_tokens(len(ids), body.max_tokens) for ids in prompts]
    if body.max_tokens is None and not served.settings.tgi:
        limits = [min(limit, DEFAULT_MAX_TOKENS) for limit in limits]
    most = body.limit_by_logprobs(served, prompts, max(limits))
    for number, (ids, limit) in enumerate(zip(prompts, limits, strict=True)):
        params = body.params(
            served,
            max_tokens=max(1, min(limit, most)),  # with 0 the engine's one token is left out of the reply
            logprobs=body.logprobs,
            prompt_logprobs=scored,
            best_of=body.best_of,
            grammar=grammar,
        )
        requests.append(Request(f"{name}-{number}", ids, params, tenant, cache_salt=body.cache_salt or ""))
    return CompletionCall(body, served, name, requests)


@dataclass
class _TextChoice:
    """The state of one text. `stream` decodes its tokens to find their character offsets."""

    prompt: Sequence[int]
    index: int
    stream: TextStream
    tokens: int = 0
    length: int = 0
    begun: bool = False

    def offsets(self, ids: Sequence[int]) -> list[int]:
        """The next tokens' offsets. A token without text, such as a begin token, has the next one's; all tokens of a
        character have its offset."""
        places = []
        for token in ids:
            places.append(self.length)
            self.length += len(self.stream.push(token))
        return places


class CompletionCall(OpenAICall):
    """A completion request (runtime.Call)."""

    def __init__(self, body: CompletionBody, served: Served, name: str, requests: list[Request]) -> None:
        super().__init__(body, served, requests, name, "text_completion")
        self._body = body
        self._scores: dict[str, Sequence[TokenLogprob | None]] = {}
        self._choices = {
            (request.id, index): _TextChoice(request.prompt, number * body.n + index, self._stream(request))
            for number, request in enumerate(requests)
            for index in range(body.n)
        }

    def push(self, output: Output) -> list[dict[str, Any]]:
        """A chunk for an output. The first begins with the prompt if echo is set."""
        found = self._choice(output)
        if not (found["text"] or found["logprobs"] or found["finish_reason"] or self._body.return_token_ids):
            return []
        chunk: dict[str, Any] = {**self._head("text_completion"), "choices": [found]}
        if self._tgi and found["finish_reason"] is None:
            found["finish_reason"] = ""
        elif self._tgi:
            choice = self._choices[output.request, output.index]
            chunk["usage"] = usage(len(choice.prompt), choice.tokens)
        if self._usage_in_chunks:
            chunk["usage"] = self._usage()
        return [chunk]

    def reply(self, outputs: Sequence[Sequence[Output]], _: Timing, /) -> Reply:
        choices = [self._choice(output) for sequences in outputs for output in sequences]
        return Reply({**self._head("text_completion"), "choices": choices, "usage": self._usage()})

    def _choice(self, output: Output) -> dict[str, Any]:
        choice = self._choices[output.request, output.index]
        body = self._body
        bare = body.max_tokens == 0
        ids: tuple[int, ...] = () if bare else output.ids
        text = "" if bare else output.text
        items: list[TokenLogprob | None] = [] if bare else list(output.logprobs or ())
        if output.prompt_logprobs is not None:  # with sequence 0's first output, which comes before all others
            self._scores[output.request] = output.prompt_logprobs
        spelled, first = list(ids), not choice.begun
        if body.echo and first:
            text = self._served.tokenizer.decode(choice.prompt, body.skip_special_tokens) + text
            items = [*self._scores.get(output.request, ()), *items]
            spelled = [*choice.prompt, *ids]
        choice.begun = True
        choice.tokens += len(ids)
        self._tokens += len(ids)
        logprobs = None
        if body.logprobs is not None and spelled:
            logprobs = self._formatter.completion(items, spelled, choice.offsets(spelled))
        found = {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length" if bare and output.finish else self._finish_reason(output),
            "stop_reason": self._stop_reason(output),
        }
        if output.prompt_logprobs is not None and body.prompt_logprobs is not None:
            found["prompt_logprobs"] = self._formatter.prompt(output.prompt_logprobs)
        if body.return_token_ids:
            found["token_ids"] = list(ids)
            found["prompt_token_ids"] = list(choice.prompt) if first else None
        return found

    def _stream(self, request: Request) -> TextStream:
        before = () if self._body.echo else request.prompt
        return TextStream(self._served.tokenizer, before, self._body.skip_special_tokens)


class TokenizeBody(Body):
    """A text to tokenize."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatBody(ChatBody):
    """A chat to tokenize."""

    return_token_strs: bool = False


class DetokenizeBody(Body):
    """Tokens to spell."""

    model: str | None = None
    tokens: Many[TokenId]


def tokenize(raw: Mapping[str, Any], served: Served) -> dict[str, Any]:
    """{"count", "max_model_len", "tokens", "token_strs"} of a prompt or of messages. Raises ApiError."""
    body: TokenizeBody | TokenizeChatBody
    if "messages" in raw:
        body = read(TokenizeChatBody, raw, served)
        ids = body.truncated(served.encode(render(body, served), body.add_special_tokens), served)
    else:
        body = validate(TokenizeBody, raw, strict=served.settings.strict_fields)
        ids = served.encode(body.prompt, body.add_special_tokens)
    served.check_model_name(body.model)
    if body.return_token_strs:
        served.check_listed(len(ids))
    strings = [served.tokenizer.token_text(token) for token in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": served.max_len, "tokens": ids, "token_strs": strings}


def detokenize(raw: Mapping[str, Any], served: Served) -> dict[str, Any]:
    """{"prompt"} of token ids. Raises ApiError for ids that the vocabulary has not."""
    body = validate(DetokenizeBody, raw, strict=served.settings.strict_fields)
    served.check_model_name(body.model)
    if bad := [token for token in body.tokens if token >= served.config.vocab_size]:
        raise ApiError("invalid", f"token {bad[0]}: the model has ids 0 to {served.config.vocab_size - 1}", "tokens")
    return {"prompt": served.tokenizer.decode(body.tokens, skip_special=False)}


def tokenizer_info(served: Served) -> dict[str, Any]:
    """What tokenizer_config.json says, its special tokens as texts, and the chat template in use."""
    tokenizer = served.tokenizer
    return {**tokenizer.settings, **tokenizer.template_variables(), "chat_template": served.template}
