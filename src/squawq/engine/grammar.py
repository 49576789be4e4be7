"""Structured output with llguidance: a JSON schema, regex, Lark or GBNF grammar as a mask over the next token.

A grammar is untrusted input. Its size is bounded (request.py), and llguidance bounds most of what it may cost, but not
all: some grammars take minutes to compile, loop for ever at their hundredth token, or overflow the stack. So each is
compiled, and followed, in a process of its own, which ends at its limits.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from squawq.engine.request import Grammar
from squawq.engine.schema import close_objects
from squawq.errors import ConfigError, EngineClosed, QueueFull
from squawq.text.child import Child, ChildError

if TYPE_CHECKING:  # the processes need neither
    import numpy as np
    from numpy.typing import NDArray

    from squawq.text.tokenizer import Tokenizer

MAX_CACHED = 32
MAX_CACHED_TEXT = 512 * 1024  # characters of their sources
MAX_LIVE = 128  # grammars that are cached or have requests that wait or run, of all tenants; each has a process
MAX_COMPILING = 4
BAD_S = 60.0  # seconds that a grammar is refused for after a token took too long
STEP_S = 0.1  # seconds of processor time for a token
MAX_MESSAGE = 500
SPACE = r"\x20|\r?\n[\x20\x09]{0,32}"  # between JSON's tokens: small models, left free, write empty lines for ever
# A step within these takes some ms; large schemas of real programs keep far below them.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 25_000,
}
_OPEN, _COMPLETE, _WRONG = b"oc!"  # how an answer begins: a mask follows, or what is wrong
_Key = tuple[str, Grammar]  # a tenant and its grammar


class GrammarError(ValueError):
    """A matcher exceeded its limits, or was given a token that the grammar forbids."""


@dataclass(eq=False)
class _Start:
    """A compiled grammar: a process at the grammar's start, and its answer there."""

    child: Child
    answer: bytes
    bad_until: float = 0.0  # refused until then (time.monotonic), because a token took too long
    lost: bool = False  # the process is gone


class Matcher:
    """One sequence's position in a grammar, over a vocabulary of `vocab_size` tokens."""

    def __init__(self, start: _Start, vocab_size: int) -> None:
        self._start = start
        self._vocab_size = vocab_size
        self._child: Child | None = None  # its own process, from the first token on
        self._answer: bytes | None = start.answer  # None: not read yet

    @property
    def complete(self) -> bool:
        """Whether nothing but an end token may follow. Raises GrammarError."""
        return self._state()[0] == _COMPLETE

    def allowed(self) -> NDArray[np.bool_]:
        """The tokens that may come next, bool [vocab_size]. Raises GrammarError."""
        import numpy as np

        bits = np.frombuffer(self._state(), dtype=np.uint8, offset=1)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def consume(self, token: int) -> None:
        """Advance by a token, without waiting: the next mask is computed while the model runs.

        Raises GrammarError for the failure of an earlier token; this one's failure is raised by the next call.
        """
        self._state()
        try:
            if self._child is None:
                self._child = self._fork()
            self._child.send(str(token).encode(), STEP_S)
        except ChildError as error:
            raise GrammarError(f"the grammar's process: {error}") from error
        self._answer = None

    def copy(self) -> Matcher:
        """A matcher at the same position. Raises GrammarError."""
        answer = self._state()
        return Matcher(_Start(self._child.fork(), answer) if self._child else self._start, self._vocab_size)

    def _state(self) -> bytes:
        if self._answer is None:
            assert self._child is not None
            try:
                self._answer = self._child.receive()
            except ChildError as error:
                self._start.bad_until = time.monotonic() + BAD_S
                raise GrammarError(f"the grammar is too complex: {error}") from error
        if self._answer[0] == _WRONG:
            raise GrammarError(self._answer[1:].decode())
        return self._answer

    def _fork(self) -> Child:
        try:
            return self._start.child.fork()
        except ChildError:
            self._start.lost = True  # its process was killed from outside: the next request compiles it again
            raise


class GrammarCompiler:
    """Compiles grammars for one tokenizer and caches the latest ones. Thread-safe.

    Tenants share no grammar: no request shows what another tenant has compiled, or how that failed.

    Args:
        timeout_s: Processor seconds for compiling a grammar.

    Raises:
        ConfigError: There are no end tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int], *, timeout_s: float = 2.0
    ) -> None:
        if not eos_ids:
            raise ConfigError("the model names no end token (eos_token_id); a grammar needs one to end with")
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._timeout_s = timeout_s
        self._starting = threading.Lock()
        self._compiling = threading.BoundedSemaphore(MAX_COMPILING)
        self._lock = threading.Lock()  # guards what follows, never for long
        self._vocabulary: Child | None = None
        self._cached: OrderedDict[_Key, _Start] = OrderedDict()
        self._live: weakref.WeakValueDictionary[_Key, _Start] = weakref.WeakValueDictionary()
        self._closed = False

    def compile(self, grammar: Grammar, tenant: str = "") -> Matcher:
        """A matcher at the grammar's start.

        Raises:
            ConfigError: The grammar is invalid or too expensive.
            QueueFull: Too many grammars are in use or being compiled.
            EngineClosed: After `close`.
        """
        key = tenant, grammar
        start = self._known(key)
        if start is None:
            if not self._compiling.acquire(timeout=2 * self._timeout_s):
                raise QueueFull("other grammars are being compiled; try again later")
            try:
                start = self._known(key) or self._keep(key, self._new(grammar))
            finally:
                self._compiling.release()
        return Matcher(start, self._vocab_size)

    def close(self) -> None:
        """End each process as soon as no matcher needs it. Idempotent; from any thread."""
        with self._lock:
            self._closed = True
            self._cached.clear()
            vocabulary = self._vocabulary
        if vocabulary is not None:
            vocabulary.close()

    def _known(self, key: _Key) -> _Start | None:
        tenant, grammar = key
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine is closed")
            start = self._live.get(key)
            if start is not None and time.monotonic() < start.bad_until:
                raise ConfigError(f"the {grammar.kind} grammar is refused: a token took too long not long ago")
            if start is not None and start.lost:
                del self._live[key]
                self._cached.pop(key, None)
                start = None
            if start is not None:
                self._remember(key, start)
            elif not self._has_room(tenant):
                self._cached.clear()  # those that no request uses go
                if not self._has_room(tenant):
                    raise QueueFull(f"{MAX_LIVE} different grammars are in use, as many as may be; try again later")
            return start

    def _has_room(self, tenant: str) -> bool:
        """Whether a tenant may have one more grammar; above MAX_LIVE only a tenant with less than an equal share may.

        So k tenants hold at most 1 + 1/2 + ... + 1/k times MAX_LIVE.
        """
        if len(self._live) < MAX_LIVE:
            return True
        owners = [owner for owner, _ in self._live]
        return owners.count(tenant) < MAX_LIVE // len({tenant, *owners})

    def _keep(self, key: _Key, start: _Start) -> _Start:
        with self._lock:
            if not self._closed:
                self._live[key] = start
                self._remember(key, start)
        return start

    def _remember(self, key: _Key, start: _Start) -> None:
        self._cached[key] = start
        self._cached.move_to_end(key)
        while len(self._cached) > MAX_CACHED or sum(len(one.text) for _, one in self._cached) > MAX_CACHED_TEXT:
            self._cached.popitem(last=False)

    def _new(self, grammar: Grammar) -> _Start:
        refused = f"the {grammar.kind} grammar is refused"
        child = None
        try:
            try:
                child = self._vocabulary_of().fork()
            except ChildError as error:
                raise QueueFull(f"no grammar can be compiled now: {error}; try again later") from error
            answer = child.call(json.dumps([grammar.kind, grammar.text]).encode(), self._timeout_s)
            if answer[0] == _WRONG:
                raise ConfigError(f"{refused}: {answer[1:].decode()}")
        except BaseException as error:
            if child is not None:
                child.close()
            if isinstance(error, ChildError):
                raise ConfigError(f"{refused}: {error} (limit: {self._timeout_s:g} s)") from error
            raise
        return _Start(child, answer)

    def _vocabulary_of(self) -> Child:
        """The process with the vocabulary, started at the first grammar: that takes a second for 128k tokens."""
        with self._starting:
            if self._vocabulary is None or not self._vocabulary.alive:
                data = [self._tokenizer.fast.to_str(), self._vocab_size, self._eos_ids]
                try:
                    vocabulary = Child.start(f"{__name__}:_Process", json.dumps(data).encode())
                except ChildError as error:
                    raise ConfigError(f"grammars cannot be used here: {error}") from error
                with self._lock:
                    self._vocabulary = vocabulary
                    if self._closed:
                        vocabulary.close()
            return self._vocabulary


class _Process:
    """The handler in the child process: first with the vocabulary alone, then at a position in a grammar."""

    def __init__(self, data: bytes) -> None:
        from llguidance import LLTokenizer

        tokenizer, vocab_size, eos_ids = json.loads(data)
        self._tokens = LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos_ids)
        self._matcher: Any = None

    def __call__(self, message: bytes) -> bytes:
        """The mask after a token, or at the start of a grammar."""
        try:
            if self._matcher is None:
                self._compile(*json.loads(message))
            else:
                self._matcher.consume_token(int(message))
            return self._answer(self._matcher)
        except BaseException as error:  # the library raises ValueError, and bare exceptions from Rust
            return bytes([_WRONG]) + _short(str(error)).encode("utf-8", "replace")

    def _compile(self, kind: str, text: str) -> None:
        from llguidance import LLMatcher, LLParserLimits
        from llguidance.gbnf_to_lark import gbnf_to_lark

        if kind == "json_schema":
            options: Any = {"whitespace_pattern": SPACE, "item_separator": ",", "key_separator": ":"}
            schema = json.dumps(close_objects(json.loads(text)))
            source = LLMatcher.grammar_from_json_schema(schema, overrides=options)
        elif kind == "regex":
            source = LLMatcher.grammar_from_regex(text)
        else:
            source = LLMatcher.grammar_from_lark(gbnf_to_lark(text) if kind == "gbnf" else text)
        limits = LLParserLimits(**LIMITS, verbose_errors=False)
        self._matcher = LLMatcher(self._tokens, source, log_level=0, limits=limits)
        trial = self._matcher.deep_copy()
        for _ in range(2):  # what is too large or can never match shows in its first steps
            bits = self._answer(trial)[1:]
            if trial.is_stopped():
                break
            first = next(i for i, byte in enumerate(bits) if byte)
            trial.consume_token(8 * first + (bits[first] & -bits[first]).bit_length() - 1)

    @staticmethod
    def _answer(matcher: Any) -> bytes:
        mask: bytes = matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return bytes([_COMPLETE if matcher.is_stopped() else _OPEN]) + mask


def _short(message: str) -> str:
    return " ".join(message.partition("<backtrace>")[0].replace("<non-verbose/>", "").split())[:MAX_MESSAGE]
