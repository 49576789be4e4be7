"""A model for the engine's tests that shows every mistake with pages, and a generation without pages to compare with.

`FakeRunner` writes for each token a number that depends on it and on what stands before it into its pages, as keys and
values do, and computes logits from what it reads back through the page table: a wrong page, a stale one, or a wrong
start gives other logits, and so other tokens.
"""

from __future__ import annotations

import itertools
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from squawq.backends.sampling import (
    SAMPLED,
    Chunk,
    Sampler,
    Sampling,
    StartedStep,
    StepOutput,
    sample,
    sampler,
    token_logprob,
)
from squawq.engine.request import FinishReason, Output, Request, SamplingParams, TokenLogprob
from squawq.engine.sequence import join

VOCAB = 48
EOS = 0
PIECES = ["", "a", "b", "c", "ab", "ba", "ca", "abc", "bca", " ", "é", "aa"]
_names = itertools.count()


def _state(before: int, token: int) -> int:
    return zlib.crc32(int(token).to_bytes(4, "little"), before)


def _row(states: NDArray[np.int64]) -> NDArray[np.float32]:
    row: NDArray[np.float32] = (
        np.random.default_rng(zlib.crc32(states.tobytes())).normal(0, 2, VOCAB).astype(np.float32)
    )
    return row


def logits_of(tokens: Sequence[int]) -> NDArray[np.float32]:
    """float32 [VOCAB] that depend on every token and its place."""
    states = list(itertools.accumulate(tokens, _state, initial=0))[1:]
    return _row(np.array(states, dtype=np.int64))


class HostRunner(ABC):
    """A runner whose logits are on the host."""

    failure: str | None = None

    @abstractmethod
    def run(self, batch: Sequence[Chunk]) -> list[NDArray[np.float32]]:
        """float32 logits [chunk.logits, vocab_size] of each chunk."""

    def prepare(self, sampling: Sampling) -> None:
        sampling.state = sampler(sampling)

    def start(self, batch: Sequence[Chunk]) -> StartedStep:
        found = sample(np.concatenate(self.run(batch)), batch)
        return StartedStep(lambda: found)

    def release(self, slot: int) -> None:  # noqa: B027 (nothing is kept)
        pass

    def close(self) -> None:  # noqa: B027 (nothing is held)
        pass


class FakeRunner(HostRunner):
    """`fail` is called before each step and may raise; `steps` are the batches that ran."""

    def __init__(self, num_pages: int = 64, page_size: int = 4, max_positions: int = 100) -> None:
        self.vocab_size = VOCAB
        self.max_positions = max_positions
        self.page_size = page_size
        self.cache_outputs = self.shares_prefixes = True
        self.max_sequences: int | None = None
        self.num_pages = num_pages
        self.steps: list[list[Chunk]] = []
        self.fail: Callable[[Sequence[Chunk]], None] = lambda batch: None
        self._memory = np.zeros((num_pages, page_size), dtype=np.int64)
        self._slots: dict[int, int] = {}  # what stands before the next token, of runners that do not share prefixes

    def run(self, batch: Sequence[Chunk]) -> list[NDArray[np.float32]]:
        self.fail(batch)
        self.steps.append([replace(chunk, pages=tuple(chunk.pages)) for chunk in batch])
        written: set[tuple[int, int]] = set()
        for chunk in batch:
            assert len(chunk.pages) * self.page_size >= chunk.start + len(chunk.ids)
            for position, token in enumerate(chunk.ids, chunk.start):
                slot = self._slot(chunk, position)
                assert slot not in written, "two sequences write one place"
                written.add(slot)
                before = self._before(chunk, position) if position else 0
                self._memory[slot] = self._slots[chunk.slot] = _state(before, token)
        return [self._logits(chunk) for chunk in batch]

    def release(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def _before(self, chunk: Chunk, position: int) -> int:
        if self.shares_prefixes:
            return int(self._memory[self._slot(chunk, position - 1)])
        return self._slots[chunk.slot]

    def _slot(self, chunk: Chunk, position: int) -> tuple[int, int]:
        return chunk.pages[position // self.page_size], position % self.page_size

    def _logits(self, chunk: Chunk) -> NDArray[np.float32]:
        end = chunk.start + len(chunk.ids)
        seen = self._memory[list(chunk.pages)].reshape(-1)[:end]
        rows = [_row(seen[: end - back]) for back in reversed(range(chunk.logits))]
        return np.stack(rows) if rows else np.zeros((0, VOCAB), dtype=np.float32)


class AheadRunner(FakeRunner):
    """A runner that lets the next step start before the outputs of this one are known, as on a GPU.

    Tokens that the engine does not know yet are those sampled last for the same sequence.
    """

    def __init__(self, num_pages: int = 64, page_size: int = 4, max_positions: int = 100) -> None:
        super().__init__(num_pages, page_size, max_positions)
        self.known: Callable[[Sequence[Chunk]], None] = lambda batch: None  # called when outputs are asked for
        self.ahead = 0  # steps started before the outputs of the last were asked for
        self._sampled: dict[Sampling, int] = {}
        self._open = 0

    def start(self, batch: Sequence[Chunk]) -> StartedStep:
        ids = [[self._sampled[_of(c)]] if list(c.ids) == [SAMPLED] else c.ids for c in batch]
        found = super().start([replace(c, ids=i) for c, i in zip(batch, ids, strict=True)]).outputs()
        for chunk, output in zip(batch, found, strict=True):
            if output.token is not None:
                self._sampled[_of(chunk)] = output.token
        self.ahead += bool(self._open)
        self._open += 1

        def outputs() -> list[StepOutput]:
            self._open -= 1
            self.known(batch)
            return found

        return StartedStep(outputs, next_may_start=not any(chunk.targets for chunk in batch))


def _of(chunk: Chunk) -> Sampling:
    assert chunk.sampling is not None
    return chunk.sampling


class FakeTokenizer:
    """A few letters a token."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "".join("" if i == EOS and skip_special else PIECES[i % len(PIECES)] for i in ids)


def request(prompt: Sequence[int], **settings: object) -> Request:
    """A request with an id of its own."""
    return Request(f"r{next(_names)}", list(prompt), SamplingParams(**settings))  # type: ignore[arg-type]


def expected(asked: Request, room: int) -> list[Output]:
    """What each sequence of a request must give in the end, computed token by token from the definition."""
    params = asked.params
    outputs = [_sequence(asked, index, room) for index in range(params.sequences)]
    if params.sequences > params.n:
        means = [sum(p.logprob for p in found) / len(found) for _, found in outputs]
        order = sorted(range(params.sequences), key=lambda i: -means[i])[: params.n]
    else:
        order = list(range(params.n))
    chosen = []
    for place, index in enumerate(order):
        output, found = outputs[index]
        logprobs = tuple(found) if params.logprobs is not None else None
        scores = prompt_scores(asked) if place == 0 else None
        chosen.append(replace(output, index=place, logprobs=logprobs, prompt_logprobs=scores))
    return chosen


def prompt_scores(asked: Request) -> tuple[TokenLogprob | None, ...] | None:
    top, prompt = asked.params.prompt_logprobs, asked.prompt
    if top is None:
        return None
    return (None, *(token_logprob(logits_of(prompt[:i]), prompt[i], top) for i in range(1, len(prompt))))


def _sequence(asked: Request, index: int, room: int) -> tuple[Output, list[TokenLogprob]]:
    params = asked.params
    ending = set(params.stop_ids) | (set() if params.ignore_eos else {EOS})
    sampler = Sampler(params, asked.prompt, sorted(ending), params.seed or 0, index)
    tokens, logprobs, text = list(asked.prompt), [], ""
    stopped: str | int | None = None
    limit = room if params.max_tokens is None else min(room, len(tokens) + params.max_tokens)
    while len(tokens) < limit:
        row = logits_of(tokens)
        token = sampler.choose(row)
        tokens.append(token)
        logprobs.append(token_logprob(row, token, params.logprobs or 0))
        if token in ending:
            stopped = token
            break
        text += FakeTokenizer().decode([token])
        ends = sorted((text.find(s) + len(s), -len(s), s) for s in params.stop if s in text)
        if ends:
            end, length, stopped = ends[0]
            text = text[: end if params.include_stop else end + length]
            break
    finish = FinishReason.LENGTH if stopped is None else FinishReason.STOP
    ids = tuple(tokens[len(asked.prompt) :])
    return Output(asked.id, index, ids, text, finish=finish, stop_reason=stopped), logprobs


def collect(outputs: Sequence[Output]) -> dict[tuple[str, int], Output]:
    """Every sequence's outputs as one; each must end exactly once, with its last."""
    found: dict[tuple[str, int], list[Output]] = {}
    for output in outputs:
        found.setdefault((output.request, output.index), []).append(output)
    for parts in found.values():
        assert [part.finish is not None for part in parts] == [False] * (len(parts) - 1) + [True]
    return {key: join(parts) for key, parts in found.items()}
