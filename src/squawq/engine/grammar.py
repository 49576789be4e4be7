"""The one door to llguidance: a JSON schema, regex or Lark grammar as a mask over the next token. Knows the tokenizer's
JSON and the end tokens; knows no logits and no requests.

A grammar is untrusted input: its size is bounded (request.py), llguidance bounds what compiling and a step may cost,
and the first steps are tried before it is accepted.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from squawq.engine.request import Grammar
from squawq.errors import ConfigError
from squawq.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_CACHED = 32
MAX_MESSAGE = 500
SPACE = r"\x20|\r?\n[\x20\x09]{0,32}"  # between JSON's tokens: small models, left free, write empty lines for ever


class GrammarError(ValueError):
    """A matcher went over its limits or met a token that it forbids."""


class Matcher:
    """One sequence's place in a grammar, over a vocabulary of `vocab_size` tokens."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def complete(self) -> bool:
        """Whether nothing but an end token may follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> NDArray[np.bool_]:
        """The tokens that may come next, bool [vocab_size]. Raises GrammarError."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def consume(self, token: int) -> None:
        """Go on by a token. Raises GrammarError for one that is not allowed."""
        self._matcher.consume_token(token)
        self._check()

    def copy(self) -> Matcher:
        """The same place, to go on from separately."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(" ".join(self._matcher.get_error().replace("<non-verbose/>", "").split())[:MAX_MESSAGE])


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps the latest ones. May be used from several threads.

    eos_ids: what ends a complete text. Raises ConfigError where there are none.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        if not eos_ids:
            raise ConfigError("the model names no end token (eos_token_id); a grammar needs one to end with")
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, Matcher] = OrderedDict()

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher at the grammar's start. Raises ConfigError for one that is wrong or costs too much."""
        with self._lock:
            if grammar not in self._compiled:
                self._compiled[grammar] = self._new(grammar)
                if len(self._compiled) > MAX_CACHED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar].copy()

    def _new(self, grammar: Grammar) -> Matcher:
        from llguidance import LLMatcher

        sources: dict[str, Callable[[str], str]] = {
            "json_schema": lambda text: LLMatcher.grammar_from_json_schema(
                text, defaults={"whitespace_pattern": SPACE}
            ),
            "regex": LLMatcher.grammar_from_regex,
            "lark": LLMatcher.grammar_from_lark,
        }
        source = sources[grammar.kind]
        try:
            matcher = Matcher(
                LLMatcher(self._tokens_of(), source(grammar.text), log_level=0, limits=_limits()), self._vocab_size
            )
            trial = matcher.copy()
            for _ in range(2):  # what is too large or can never match shows in its first steps
                first = int(np.argmax(trial.allowed()))
                if trial.complete:
                    break
                trial.consume(first)
        except ConfigError:
            raise
        except Exception as error:  # the library raises ValueError, and bare exceptions from Rust
            raise ConfigError(
                f"the {grammar.kind} grammar is refused: {' '.join(str(error).split())[:MAX_MESSAGE]}"
            ) from error
        return matcher

    def _tokens_of(self) -> LLTokenizer:
        """The vocabulary as llguidance's trie; built at the first grammar, since it takes a second for 128k tokens."""
        from llguidance import LLTokenizer

        if self._tokens is None:
            text = self._tokenizer.fast.to_str()
            self._tokens = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_ids)
        return self._tokens


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False)
