"""What goes into the engine and what comes out: sampling parameters, requests and outputs.

Values are validated when they are set; `Request.check` tells whether a request fits a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import Annotated

from pydantic import BeforeValidator, Field

from squawq.errors import ConfigError
from squawq.showing import beside_defaults
from squawq.strict import refuse, strict

GRAMMARS = ("json_schema", "regex", "lark", "gbnf")
MAX_GRAMMAR_BYTES = 64 * 1024
MAX_LOGPROBS = 20
MAX_SEQUENCES = 64
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
MAX_BIASES = 1024
MAX_ALLOWED = 2**18  # the largest vocabularies
MAX_BAD = 128
MAX_BAD_LENGTH = 64


Count = Annotated[int, Field(ge=0, le=2**31 - 1, description="a whole number, 0 to 2147483647")]
Share = Annotated[float, Field(gt=0, le=1, description="above 0, at most 1")]
Penalty = Annotated[float, Field(ge=-2, le=2, description="-2 to 2")]
Logprobs = Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS, description=f"a whole number, 0 to {MAX_LOGPROBS}")]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _tuple(most: int) -> BeforeValidator:
    """Lists as tuples, so that parameters can be hashed.

    Too long a list is refused before its items are looked at: an error for each would hold the interpreter for seconds.
    """

    def convert(value: object) -> object:
        if isinstance(value, list | tuple) and len(value) > most:
            raise ValueError("too long")
        return tuple(value) if isinstance(value, list) else value

    return BeforeValidator(convert)


@strict()
class Grammar:
    """What the text must match: kind "json_schema", "regex", "lark" (llguidance's dialect) or "gbnf" (llama.cpp's), and
    its source. Objects in a JSON schema are closed (squawq.engine.schema)."""

    kind: str
    text: Annotated[str, Field(min_length=1, description="the text of a grammar")]

    def __post_init__(self) -> None:
        if self.kind not in GRAMMARS:
            raise refuse("grammar kind", self.kind, f"one of {', '.join(GRAMMARS)}")
        if (size := len(self.text.encode("utf-8", "surrogatepass"))) > MAX_GRAMMAR_BYTES:
            raise ConfigError(f"the grammar has {size} bytes; at most {MAX_GRAMMAR_BYTES} are allowed")


@strict()
class SamplingParams:
    """How tokens are sampled, and when to stop. The default is greedy, 256 tokens at most.

    Logits are processed in this order: logit_bias; repetition_penalty over prompt and output (Keskar et al., arXiv
    1909.05858: positive logits divided, negative multiplied); frequency_penalty per occurrence and presence_penalty
    once, over the output (OpenAI's definition); allowed_ids; bad_ids; min_tokens, which forbids end tokens; grammar;
    temperature (below 1e-6: greedy); top_k (0: off); typical_p (Meister et al., arXiv 2202.00666); top_p (Holtzman et
    al., arXiv 1904.09751); min_p, relative to the likeliest token. Each works on the renormalized distribution that the
    one before left. Where a grammar allows only an end token, it overrides allowed_ids, bad_ids and min_tokens. A
    sequence without a possible token ends with an error.

    Attributes:
        max_tokens: New tokens at most; None: up to the context.
        seed: The same seed gives the same text; None: a random one.
        n, best_of: n sequences are returned, those with the best mean log probability of best_of. Each sequence has its
            own random stream, and the first is what n=1 gives.
        allowed_ids: The only tokens that may be sampled, end tokens included (vLLM's allowed_token_ids).
        bad_ids: Token sequences that may not occur (vLLM's bad_words): the last token of each is forbidden where the
            output ends with the others.
        stop, include_stop: Strings that end the text, from min_tokens on. It is cut before them, or after them.
        stop_ids: Tokens that end it, beside the model's end tokens, which ignore_eos disables.
        logprobs, prompt_logprobs: Alternatives per token (0: the token alone), from the raw logits; None: off.

    Raises:
        ConfigError: A value is out of range.
    """

    max_tokens: Annotated[
        int | None, Field(ge=1, le=2**31 - 1, description="at least 1 (or None: up to the context)")
    ] = 256
    min_tokens: Count = 0
    temperature: Annotated[float, Field(ge=0, le=100, description="0 to 100")] = 0.0
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1, description="0 (off) or more")] = 0
    top_p: Share = 1.0
    min_p: Annotated[float, Field(ge=0, le=1, description="0 to 1")] = 0.0
    typical_p: Share = 1.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, description="0.01 to 100")] = 1.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: Annotated[
        Annotated[Mapping[TokenId, Bias], Field(max_length=MAX_BIASES)] | None,
        Field(description=f"a mapping of at most {MAX_BIASES} token ids to numbers, -100 to 100"),
    ] = None
    allowed_ids: Annotated[
        Annotated[Sequence[TokenId], Field(min_length=1)] | None,
        _tuple(MAX_ALLOWED),
        Field(description=f"a list of 1 to {MAX_ALLOWED} token ids"),
    ] = None
    bad_ids: Annotated[
        Sequence[Annotated[Sequence[TokenId], _tuple(MAX_BAD_LENGTH), Field(min_length=1)]],
        _tuple(MAX_BAD),
        Field(description=f"at most {MAX_BAD} lists of 1 to {MAX_BAD_LENGTH} token ids"),
    ] = ()
    seed: Annotated[int | None, Field(ge=0, le=2**63 - 1, description="0 to 2^63 - 1")] = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES, description=f"a whole number, 1 to {MAX_SEQUENCES}")] = 1
    best_of: Annotated[int | None, Field(ge=1, le=MAX_SEQUENCES, description=f"n to {MAX_SEQUENCES}")] = None
    stop: Annotated[
        Sequence[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
        _tuple(MAX_STOPS),
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
        Field(description=f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters"),
    ] = ()
    include_stop: Annotated[bool, Field(description="true or false")] = False
    stop_ids: Annotated[
        Sequence[TokenId], _tuple(MAX_BIASES), Field(description=f"a list of 0 to {MAX_BIASES} token ids")
    ] = ()
    ignore_eos: Annotated[bool, Field(description="true or false")] = False
    logprobs: Logprobs = None
    prompt_logprobs: Logprobs = None
    grammar: Annotated[Grammar | None, Field(description="a Grammar")] = None
    skip_special_tokens: Annotated[bool, Field(description="true or false")] = True

    __repr__ = beside_defaults

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise refuse("min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}")
        if self.best_of is not None and self.best_of < self.n:
            raise refuse("best_of", self.best_of, f"n ({self.n}) to {MAX_SEQUENCES}")
        if self.grammar is not None and self.ignore_eos:
            raise ConfigError("ignore_eos is true beside a grammar; a grammar ends with the end token")

    @property
    def sequences(self) -> int:
        return self.n if self.best_of is None else self.best_of


@dataclass(frozen=True)
class Request:
    """A prompt of token ids and its sampling parameters."""

    id: str  # unique among the requests in flight
    prompt: Sequence[int]
    params: SamplingParams
    tenant: str = ""  # tenants are served round robin and share no cached prefixes
    group: str | None = None  # a tenant's requests of one group take turns as if they were one request
    cache_salt: str = ""  # prefixes are shared only by requests with the same salt (as in vLLM)

    def check(self, vocab_size: int, max_positions: int, cache_tokens: int) -> None:
        """Raise ConfigError where the request cannot be run by a model of these sizes."""
        count, ids, params = len(self.prompt), f"the model has ids 0 to {vocab_size - 1}", self.params
        if not count:
            raise ConfigError("the prompt is empty; give at least one token")
        if bad := [i for i in self.prompt if not isinstance(i, int) or not 0 <= i < vocab_size]:
            raise ConfigError(f"the prompt has the token id {bad[0]!r}; {ids}")
        if count >= max_positions:
            raise ConfigError(f"the prompt has {count} tokens; the model has {max_positions} positions")
        if count >= cache_tokens:
            raise ConfigError(f"the prompt has {count} tokens; the cache holds {cache_tokens} (kv_tokens)")
        named: dict[str, Iterable[int]] = {
            "stop_ids": params.stop_ids,
            "logit_bias": params.logit_bias or (),
            "allowed_ids": params.allowed_ids or (),
            "bad_ids": chain.from_iterable(params.bad_ids),
        }
        for name, values in named.items():
            if (largest := max(values, default=0)) >= vocab_size:
                raise ConfigError(f"{name} has the token id {largest}; {ids}")


class FinishReason(StrEnum):
    """Why a sequence ended; each has exactly one."""

    STOP = "stop"  # an end token, a stop id or a stop string
    LENGTH = "length"  # max_tokens, the context or the KV cache is used up
    ABORT = "abort"  # the client left, or the engine was closed
    ERROR = "error"  # its own processing or the model failed


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log probability, from the raw logits."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # alternatives and theirs, likeliest first
    text: str = ""  # of the token; only `LLM.complete` fills in texts
    top_texts: tuple[str, ...] = ()  # of `top`

    __repr__ = beside_defaults


@dataclass(frozen=True)
class Output:
    """New tokens of one sequence of a request."""

    request: str
    index: int
    ids: tuple[int, ...] = ()  # an end token included
    text: str = ""  # what they add to the text, without end tokens and stop strings unless include_stop is set
    logprobs: tuple[TokenLogprob, ...] | None = None  # one for each of `ids`, if requested
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # in sequence 0's first output; None for token 0
    finish: FinishReason | None = None  # set in a sequence's last output only
    stop_reason: str | int | None = None  # the stop string, the end token's id, or the error message

    __repr__ = beside_defaults


Sink = Callable[[Output], object]
