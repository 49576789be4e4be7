"""What goes into the engine and what comes out: sampling parameters, requests and outputs.

Every value is validated on its own; whether a request fits a model (vocabulary, positions, pages) the engine checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from squawq.errors import ConfigError
from squawq.showing import beside_defaults

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


def _refuse(name: str, value: object, rule: str) -> ConfigError:
    shown = repr(value)
    return ConfigError(f"{name} is {shown if len(shown) <= 100 else shown[:97] + '...'}; it must be {rule}")


def _whole(name: str, value: object, least: int, most: int, rule: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _refuse(name, value, rule or f"a whole number, {least} to {most}")


def _real(name: str, value: object, least: float, most: float, *, above: bool = False) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not least <= number <= most or (above and number == least):
        raise _refuse(name, value, f"above {least:g}, at most {most:g}" if above else f"{least:g} to {most:g}")


def _ids(name: str, ids: object, least: int, most: int) -> tuple[int, ...]:
    if not isinstance(ids, list | tuple) or not least <= len(ids) <= most:
        raise _refuse(name, ids, f"a list of {least} to {most} token ids")
    for token in ids:
        _whole(name, token, 0, 2**31 - 1)
    return tuple(ids)


@dataclass(frozen=True)
class Grammar:
    """What the text must match: kind "json_schema", "regex", "lark" (llguidance's dialect) or "gbnf" (llama.cpp's), and
    its source. Objects of a JSON schema are closed (squawq.engine.schema)."""

    kind: str
    text: str

    def __post_init__(self) -> None:
        if self.kind not in GRAMMARS:
            raise _refuse("grammar kind", self.kind, f"one of {', '.join(GRAMMARS)}")
        if not isinstance(self.text, str) or not self.text:
            raise _refuse("grammar text", self.text, "text")
        if (size := len(self.text.encode("utf-8", "surrogatepass"))) > MAX_GRAMMAR_BYTES:
            raise ConfigError(f"the grammar has {size} bytes; at most {MAX_GRAMMAR_BYTES} are allowed")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and when to stop. The defaults take the likeliest token, 256 times at most.

    A row of logits goes through these in this order: logit_bias; repetition_penalty over prompt and output (Keskar et
    al., arXiv 1909.05858: positive logits divided, negative multiplied); frequency_penalty per occurrence and
    presence_penalty once, over the output (OpenAI's definition); allowed_ids; bad_ids; min_tokens, which forbids ending
    tokens; grammar; temperature (below 1e-6: the likeliest token); top_k (0: off); typical_p (Meister et al., arXiv
    2202.00666); top_p (Holtzman et al., arXiv 1904.09751); min_p, relative to the likeliest. Each sees the distribution
    that the one before left, scaled to sum to 1. A grammar that allows nothing but an end goes before allowed_ids,
    bad_ids and min_tokens. Where no token is left the sequence ends with an error.

    max_tokens: new tokens at most; None: up to the context. seed: the same text again; None: another each time.
    n sequences are returned, the best (by mean logprob) of best_of where that is more; sequence i has a stream of
    random numbers of its own, and sequence 0 is what n=1 gives.
    allowed_ids: None, or the only tokens that may be chosen; ending tokens are no exception: without one of them a text
    goes on up to max_tokens (as with vLLM's allowed_token_ids). bad_ids: sequences of tokens that may not come up: the
    last token of each is forbidden where the output ends with those before it (as with vLLM's bad_words).
    stop: strings that end the text, which is cut before them, or after them with include_stop; not looked for before
    min_tokens. stop_ids: tokens that end it beside the model's own, which ignore_eos switches off.
    logprobs, prompt_logprobs: None, or so many alternatives to each token (0: the token's own alone), from the raw
    model before all of the above.
    Raises ConfigError for a value out of range.
    """

    max_tokens: int | None = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_ids: Sequence[int] | None = None
    bad_ids: Sequence[Sequence[int]] = ()
    seed: int | None = None
    n: int = 1
    best_of: int | None = None
    stop: Sequence[str] = ()
    include_stop: bool = False
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    skip_special_tokens: bool = True

    __repr__ = beside_defaults

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lists()
        for name in ("include_stop", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _refuse(name, getattr(self, name), "true or false")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise _refuse("grammar", self.grammar, "a Grammar")
        if self.grammar is not None and self.ignore_eos:
            raise ConfigError("ignore_eos is true beside a grammar; a grammar ends with the end token")

    def _check_numbers(self) -> None:
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, 2**31 - 1, "at least 1 (or None: up to the context)")
        _whole("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refuse("min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}")
        _real("temperature", self.temperature, 0, 100)
        _whole("top_k", self.top_k, 0, 2**31 - 1, "0 (off) or more")
        for name in ("top_p", "typical_p"):
            _real(name, getattr(self, name), 0, 1, above=True)
        _real("min_p", self.min_p, 0, 1)
        _real("repetition_penalty", self.repetition_penalty, 0.01, 100)  # logits are divided by it
        for name in ("frequency_penalty", "presence_penalty"):
            _real(name, getattr(self, name), -2, 2)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**63 - 1, "0 to 2^63 - 1")
        _whole("n", self.n, 1, MAX_SEQUENCES)
        if self.best_of is not None:
            _whole("best_of", self.best_of, self.n, MAX_SEQUENCES, f"n ({self.n}) to {MAX_SEQUENCES}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, MAX_LOGPROBS)

    def _check_lists(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        good = isinstance(stop, list | tuple) and len(stop) <= MAX_STOPS
        if not good or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in stop):
            raise _refuse("stop", self.stop, f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_ids", _ids("stop_ids", self.stop_ids, 0, MAX_BIASES))
        if self.allowed_ids is not None:
            object.__setattr__(self, "allowed_ids", _ids("allowed_ids", self.allowed_ids, 1, MAX_ALLOWED))
        bad = self.bad_ids
        if not isinstance(bad, list | tuple) or len(bad) > MAX_BAD:
            raise _refuse("bad_ids", bad, f"a list of at most {MAX_BAD} lists of token ids")
        object.__setattr__(self, "bad_ids", tuple(_ids("bad_ids", ids, 1, MAX_BAD_LENGTH) for ids in bad))
        bias = self.logit_bias
        if bias is None:
            return
        if not isinstance(bias, Mapping) or len(bias) > MAX_BIASES:
            raise _refuse("logit_bias", bias, f"a mapping of at most {MAX_BIASES} token ids to numbers")
        for token, value in bias.items():
            _whole("logit_bias", token, 0, 2**31 - 1, "a mapping of token ids to numbers")
            _real("logit_bias", value, -100, 100)
        object.__setattr__(self, "logit_bias", dict(bias))

    @property
    def sequences(self) -> int:
        """How many sequences are run."""
        return self.n if self.best_of is None else self.best_of


@dataclass(frozen=True)
class Request:
    """One prompt of token ids and what to make of it. `id` is unique among the requests that are under way.

    tenant: on whose behalf; tenants are served round robin and find no cached prefix of one another. group: requests of
    a tenant with the same one take turns with its others as a single request; None: this one alone. cache_salt: cached
    prefixes are found by requests with the same one alone (as with vLLM).
    """

    id: str
    prompt: Sequence[int]
    params: SamplingParams
    tenant: str = ""
    group: str | None = None
    cache_salt: str = ""


class FinishReason(StrEnum):
    """Why a sequence ended: exactly one for each.

    stop: an end token, a stop id or a stop string; length: max_tokens, the context or the pages are used up; abort: the
    caller went away or the engine closed; error: its own processing or the model failed.
    """

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log probability by the raw model, and the likeliest tokens there with theirs, best first.

    text, top_texts: what the token and each of `top` stands for; empty where nobody asked a tokenizer.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    text: str = ""
    top_texts: tuple[str, ...] = ()

    __repr__ = beside_defaults


@dataclass(frozen=True)
class Output:
    """News of one sequence of a request.

    ids: new tokens, an ending one included. text: what they add to the text; an ending token or stop string is left
    out unless include_stop asks for it. logprobs: one for each of `ids`, where they were asked for. prompt_logprobs:
    one for each token of the prompt (None for the first, which follows nothing), with sequence 0's first output.
    finish: set in a sequence's last output, and in that alone. stop_reason: the stop string, the ending token's id, or
    the error's text.
    """

    request: str
    index: int
    ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: FinishReason | None = None
    stop_reason: str | int | None = None

    __repr__ = beside_defaults


Sink = Callable[[Output], object]
