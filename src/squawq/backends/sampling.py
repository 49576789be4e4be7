"""Sampling on the host: from rows of logits to tokens and log probabilities, in numpy on the calling thread.

`Backend.sample` is this unless a backend samples on its device. Each sequence is sampled by itself, so that its tokens
cannot depend on the batch. numpy and not torch, whose OpenMP threads would compete with the kernels' own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from squawq.engine.request import SamplingParams, TokenLogprob

Row = NDArray[np.float32]
Ids = NDArray[np.int64]
GREEDY_BELOW = 1e-6  # a temperature under this would overflow float32 where it does not change the outcome
# Logits this far under the top are sorted, those further down only when they matter.
_DEPTHS = (2.0, 4.0, 6.0, 9.0, 14.0, 24.0, math.inf)
_SLACK = 1e-9  # of the whole mass: far above float64's rounding, so that a sum in another order decides the same


class TokenMask(Protocol):
    """The tokens that a grammar allows next. Read as late as possible: it is computed while the model runs."""

    @property
    def complete(self) -> bool:
        """Whether nothing but an end token may follow."""

    def allowed(self) -> NDArray[np.bool_]:
        """bool [vocab_size]."""


@dataclass(eq=False)
class Sampling:
    """How the tokens of one sequence are sampled: the same object in each of its steps."""

    params: SamplingParams
    prompt: Sequence[int]  # for the penalties
    ending: Iterable[int]  # what `min_tokens` forbids
    seed: int  # of the request
    index: int  # of the sequence in its request; names the random stream together with the seed
    logprobs: int | None = None  # number of alternatives; None: no log probabilities
    grammar: TokenMask | None = None
    state: Any = None  # the sampler's own: counts for penalties, the random stream
    tokens: Sequence[int] = ()  # prompt and output so far; grows with the sequence


SAMPLED = -1  # in Chunk.ids: the token that the step before samples, which is known on the device alone


@dataclass(frozen=True)
class Chunk:
    """One sequence's part of a step."""

    ids: Sequence[int]  # tokens to run; or SAMPLED alone
    start: int  # position of the first: the number of the sequence's tokens in the KV cache
    pages: Sequence[int]  # page table, for start + len(ids) tokens
    logits: int  # rows of logits: after so many of the last `ids`
    sampling: Sampling | None = None  # sample the next token; None in the middle of a prompt
    again: Sampling | None = None  # the sequence, if the token in `ids` was generated before a preemption
    targets: Sequence[int] = ()  # compute log probabilities of these prompt tokens, which follow the first of `ids`
    top: int = 0  # alternatives for each target
    slot: int = 0  # the sequence's number among those that run, below max_num_seqs; it keeps it while it has pages


@dataclass(frozen=True)
class StepOutput:
    """What a step computed for a chunk."""

    token: int | None = None
    logprob: TokenLogprob | None = None  # if `Sampling.logprobs` asks for it
    prompt_logprobs: Sequence[TokenLogprob] = ()  # one for each of `Chunk.targets`
    error: BaseException | None = None  # why this sequence alone failed


@dataclass(frozen=True)
class StartedStep:
    """A step that runs, or has run.

    Attributes:
        outputs: Waits until it has run; returns one output for each chunk.
        next_may_start: Before these outputs are known. The next step's chunks then have SAMPLED for their tokens.
    """

    outputs: Callable[[], list[StepOutput]]
    next_may_start: bool = False


class NoTokenError(ValueError):
    """Every token is forbidden, or the logits are not finite."""


def token_logprob(row: Row, token: int, top: int) -> TokenLogprob:
    """A token's log probability by float32 logits [vocab] and the `top` likeliest, ties in the order of ids."""
    peak = row.max()
    shifted = row - peak
    log_total = float(np.log(np.exp(shifted).sum(dtype=np.float64)))
    best: list[tuple[int, float]] = []
    if top:
        ids = _descending(shifted, lambda found, _: len(found) >= top)[:top]
        best = [(int(i), float(shifted[i]) - log_total) for i in ids]
    return TokenLogprob(token, float(shifted[token]) - log_total, tuple(best))


def draw(row: Row, params: SamplingParams, uniform: float) -> int:
    """Sample from float32 logits [vocab] by temperature, top_k, typical_p, top_p, min_p and `uniform` in [0, 1).

    The remaining tokens are in descending order, ties by id; the first whose cumulative probability exceeds `uniform`
    is taken. Weights are float32, sums float64. Only as many tokens are sorted as the result needs.
    """
    scaled = (row - row.max()) / np.float32(params.temperature)
    weights = np.exp(scaled)
    total = float(weights.sum(dtype=np.float64))
    need = (params.top_p if params.top_p < 1 else uniform) * total + _SLACK * total

    mean = _mean(scaled, weights, total) if params.typical_p < 1 else 0.0

    def enough(ids: Ids, depth: float) -> bool:
        if params.top_k:
            return len(ids) >= params.top_k
        if params.typical_p < 1:  # what lies deeper is farther from the mean than these
            near = ids[np.abs(mean - scaled[ids].astype(np.float64)) < mean + depth]
            return float(weights[near].sum(dtype=np.float64)) > params.typical_p * total + _SLACK * total
        if math.exp(-depth) < 0.99 * params.min_p:
            return True  # what min_p leaves is all there
        if params.min_p and params.top_p == 1:
            return False
        return float(weights[ids].sum(dtype=np.float64)) > need

    ids = _descending(scaled, enough)
    if params.top_k:
        ids = ids[: params.top_k]
        total = float(weights[ids].sum(dtype=np.float64))
        mean = _mean(scaled[ids], weights[ids], total) if params.typical_p < 1 else 0.0
    if params.typical_p < 1:
        ids = ids[_typical(scaled[ids], weights[ids], mean, params.typical_p * total)]
        total = float(weights[ids].sum(dtype=np.float64))
    mass = np.cumsum(weights[ids], dtype=np.float64)
    count = len(ids)
    if params.top_p < 1:
        count = min(int(np.searchsorted(mass, params.top_p * total)) + 1, count)
    if params.min_p:
        count = int(np.count_nonzero(weights[ids[:count]] >= np.float32(params.min_p) * weights[ids[0]]))
    if params.top_p < 1 or params.min_p:
        total = float(mass[count - 1])
    return int(ids[min(int(np.searchsorted(mass[:count], uniform * total, side="right")), count - 1)])


def _mean(scaled: Row, weights: Row, total: float) -> float:
    """The mean scaled logit by its own distribution; a token's information less the entropy is this less its logit."""
    return float((weights * np.where(weights > 0, scaled, np.float32(0))).sum(dtype=np.float64)) / total


def _typical(scaled: Row, weights: Row, mean: float, mass: float) -> NDArray[np.bool_]:
    """Mask of the tokens whose information is nearest to the entropy, up to a total weight of `mass`."""
    order = np.argsort(np.abs(mean - scaled.astype(np.float64)), kind="stable")
    count = int(np.searchsorted(np.cumsum(weights[order], dtype=np.float64), mass)) + 1
    kept = np.zeros(len(weights), dtype=np.bool_)
    kept[order[:count]] = True
    return kept


def _descending(scaled: Row, enough: Callable[[Ids, float], bool]) -> Ids:
    """Ids by descending value, ties by id, of float32 [vocab] with maximum 0: a prefix of the order that is `enough`.

    All values above a threshold are a prefix of the full order, so sorting only those changes nothing.
    """
    for depth in _DEPTHS:
        ids = np.flatnonzero(scaled > -depth)
        if depth == math.inf or enough(ids, depth):
            break
    return ids[np.argsort(-scaled[ids], kind="stable")]


class _Counts:
    """Counts of ids, as arrays: O(1) to add."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._slots: dict[int, int] = {}
        self._ids = np.zeros(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        self._counts[slot] += 1

    @property
    def ids(self) -> Ids:
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> Row:
        return self._counts[: len(self._slots)]


class Sampler:
    """Samples one sequence's tokens, with the state of its penalties and its random stream.

    (seed, index) select a Philox stream (Salmon et al., SC 2011), of which each token takes one number.
    """

    def __init__(
        self, params: SamplingParams, prompt: Iterable[int], ending: Iterable[int], seed: int, index: int
    ) -> None:
        self._params = params
        self._greedy = params.temperature < GREEDY_BELOW
        self._random = None if self._greedy else np.random.Generator(np.random.Philox(seed=[seed, index]))
        bias = params.logit_bias or {}
        self._bias_ids = np.fromiter(bias, dtype=np.int64)
        self._bias = np.fromiter(bias.values(), dtype=np.float32)
        self._only = None if params.allowed_ids is None else np.array(params.allowed_ids, dtype=np.int64)
        self._bad = [(tuple(ids[:-1]), ids[-1]) for ids in params.bad_ids]
        self._tail: deque[int] = deque(maxlen=max((len(before) for before, _ in self._bad), default=0))
        self._ending = np.fromiter(ending, dtype=np.int64)
        self._repeats = params.repetition_penalty != 1
        self._counted = bool(params.frequency_penalty or params.presence_penalty)
        self._seen = _Counts(dict.fromkeys(prompt) if self._repeats else ())
        self._output = _Counts()
        self._chosen = 0

    def choose(self, row: Row, allowed: NDArray[np.bool_] | None = None, complete: bool = False) -> int:
        """Sample the next token from float32 logits [vocab], which are not changed.

        allowed: the grammar's mask, bool [vocab]. complete: the grammar allows only an end token, which overrides what
        the parameters forbid. Raises NoTokenError.
        """
        early = self._chosen < self._params.min_tokens
        forbidding = not complete and (early or self._only is not None or bool(self._bad))
        logits = row
        if len(self._bias) or self._repeats or self._counted or forbidding or allowed is not None:
            logits = self._adjusted(row)
            if forbidding:
                self._forbid(logits)
            if allowed is not None:
                logits[~allowed] = -np.inf
        token = int(logits.argmax())
        if not np.isfinite(logits[token]):  # argmax finds a NaN first
            raise NoTokenError("no token can be chosen: the model's logits are not finite, or all tokens are forbidden")
        if self._random is not None:
            with np.errstate(over="ignore"):  # far tokens become -inf, whose weight is 0
                token = draw(logits, self._params, float(self._random.random()))
        self._remember(token)
        return token

    def _adjusted(self, row: Row) -> Row:
        params = self._params
        logits = row.astype(np.float32)
        logits[self._bias_ids] += self._bias
        if self._repeats:
            penalty = np.float32(params.repetition_penalty)
            seen = logits[self._seen.ids]
            logits[self._seen.ids] = np.where(seen > 0, seen / penalty, seen * penalty)
        if self._counted:
            counts = self._output.counts
            logits[self._output.ids] -= params.frequency_penalty * counts + np.float32(params.presence_penalty)
        return logits

    def _forbid(self, logits: Row) -> None:
        if self._only is not None:
            kept = logits[self._only]
            logits.fill(-np.inf)
            logits[self._only] = kept
        tail = tuple(self._tail)
        for before, last in self._bad:
            if len(before) <= len(tail) and tail[len(tail) - len(before) :] == before:
                logits[last] = -np.inf
        if self._chosen < self._params.min_tokens:
            logits[self._ending] = -np.inf

    def _remember(self, token: int) -> None:
        self._chosen += 1
        if self._repeats:
            self._seen.add(token)
        if self._counted:
            self._output.add(token)
        if self._bad:
            self._tail.append(token)


def sampler(sampling: Sampling) -> Sampler:
    """The state with which `sample` samples one sequence."""
    return Sampler(sampling.params, sampling.prompt, sampling.ending, sampling.seed, sampling.index)


def sample(logits: Row, batch: Sequence[Chunk]) -> list[StepOutput]:
    """Sample each chunk of a step by its rows of float32 logits [rows, vocab], `chunk.logits` of them in order."""
    found, end = [], 0
    for chunk in batch:
        start, end = end, end + chunk.logits
        found.append(_sample(chunk, logits[start:end]))
    return found


def _sample(chunk: Chunk, rows: Row) -> StepOutput:
    try:
        scores = [token_logprob(row, token, chunk.top) for row, token in zip(rows, chunk.targets, strict=False)]
        if (sampling := chunk.sampling) is None:
            return StepOutput(prompt_logprobs=scores)
        state: Sampler = sampling.state or sampler(sampling)
        sampling.state = state
        if (grammar := sampling.grammar) is None:
            token = state.choose(rows[-1])
        else:
            token = state.choose(rows[-1], grammar.allowed(), grammar.complete)
        top = sampling.logprobs
        return StepOutput(token, None if top is None else token_logprob(rows[-1], token, top), scores)
    except BaseException as error:  # Rust's panics too: it is the sequence's own failure
        return StepOutput(error=error)
