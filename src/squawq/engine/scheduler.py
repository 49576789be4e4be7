"""Which tokens of which sequences run in the next step, and on which pages. Plain Python: no tensors, no text.

Continuous batching (Yu et al., Orca, OSDI 2022) with prompts in chunks (Agrawal et al., arXiv 2308.16369) over paged
keys and values (Kwon et al., arXiv 2309.06180). When pages run out the youngest sequence gives its own back.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from squawq.engine.pages import ROOT, PagePool, chain

MAX_SCORED = 64  # rows of logits a step for prompt logprobs: 64 rows of 152k float32 are 39 MB


@dataclass(eq=False)
class Sequence:
    """One sequence's place in the queue, tokens and pages.

    tokens: prompt and output. limit: tokens at most. arrival: its place among all. after: a sibling whose prompt is
    computed first, so that this one finds it in the cache. score: logits of the whole prompt are wanted, so the cache
    is not read. computed: tokens whose keys and values lie in `pages`. digests: of the full pages of `tokens`.
    """

    tokens: list[int]
    limit: int
    arrival: int
    after: Sequence | None = None
    score: bool = False
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    ended: bool = False
    prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    def __lt__(self, other: Sequence) -> bool:
        return self.arrival < other.arrival

    @property
    def left(self) -> int:
        """Tokens still to run before the next can be chosen."""
        return len(self.tokens) - self.computed

    @property
    def blocked(self) -> bool:
        """Whether the sibling that computes the common prompt is not there yet."""
        return self.after is not None and not self.after.ended and self.after.computed < self.prompt


class Scheduler:
    """Plans steps of at most `max_tokens` tokens of at most `max_sequences` sequences.

    Decodes come first and take at most half a step, since max_tokens >= 2 * max_sequences: neither they nor prompts
    starve. Prompts follow in order of arrival. A sequence that was given pages keeps them until it ends or is the
    youngest when an older one needs a page; then it waits again at its place. The oldest is never put back, so all end.
    """

    def __init__(self, pool: PagePool, max_tokens: int, max_sequences: int, prefix_caching: bool) -> None:
        assert max_tokens >= 2 * max_sequences
        self.pool = pool
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences
        self._caching = prefix_caching

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose `limit` tokens fit into the pool."""
        assert sequence.prompt < sequence.limit <= self.pool.num_pages * self.pool.page_size
        insort(self.waiting, sequence)

    def end(self, sequence: Sequence) -> None:
        """Take a sequence out, at any moment; its pages go back."""
        if not sequence.ended:
            sequence.ended = True
            (self.running if sequence.pages else self.waiting).remove(sequence)
            self._drop(sequence)

    def plan(self) -> list[tuple[Sequence, int]]:
        """The next step: sequences and how many of their tokens to run from `computed` on."""
        shares: list[tuple[Sequence, int]] = []
        for sequence in list(self.running):
            if sequence.left == 1 and sequence.pages and self._grow(sequence):
                shares.append((sequence, 1))
        budget, scored = self._max_tokens - len(shares), MAX_SCORED
        decoding = {id(sequence) for sequence, _ in shares}
        for sequence in self._prompts(decoding):
            count = min(sequence.left, budget, scored if sequence.score else budget)
            if count:
                shares.append((sequence, count))
            budget -= count
            scored -= count if sequence.score else 0
            if not budget:
                break
        return shares

    def advance(self, sequence: Sequence, count: int) -> None:
        """Say that `count` more tokens are in the pages; those that became full can be found from now on."""
        sequence.computed += count
        if self._caching:
            full = sequence.computed // self.pool.page_size
            first = (sequence.computed - count) // self.pool.page_size
            self._extend_digests(sequence, full)
            for index in range(first, full):
                self.pool.register(sequence.pages[index], sequence.digests[index])

    def check(self) -> None:
        """Assert that no page is lost, shared wrongly or held by nobody."""
        self.pool.check(sequence.pages for sequence in self.running)
        assert not any(sequence.pages or sequence.computed for sequence in self.waiting)
        assert all(len(s.pages) * self.pool.page_size >= s.computed for s in self.running)

    def _prompts(self, decoding: set[int]) -> Iterator[Sequence]:
        """Running sequences with more than a decode's token to run, then waiting ones as they are admitted."""
        yield from [sequence for sequence in self.running if id(sequence) not in decoding]
        for sequence in list(self.waiting):
            if len(self.running) >= self._max_sequences:
                return
            if sequence.blocked:
                continue
            if not self._admit(sequence):
                return  # first come, first served: a smaller one behind does not overtake
            yield sequence

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence pages for all its tokens, if each running one could still take one more."""
        shared: list[int] = []
        if self._caching and not sequence.score:
            reusable = (len(sequence.tokens) - 1) // self.pool.page_size  # at least one token must run
            self._extend_digests(sequence, reusable)
            shared = self.pool.match(sequence.digests[:reusable])
        fresh = self.pool.pages_for(len(sequence.tokens)) - len(shared)
        if fresh + self.pool.idle(shared) + len(self.running) > self.pool.available:
            return False
        self.pool.share(shared)
        sequence.pages = shared + [self.pool.take() for _ in range(fresh)]
        sequence.computed = len(shared) * self.pool.page_size
        if self._caching and not sequence.score:
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += sequence.computed
        self.waiting.remove(sequence)
        insort(self.running, sequence)
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """A page for the next token, where it needs one; False if the sequence itself had to give way."""
        if len(sequence.tokens) <= len(sequence.pages) * self.pool.page_size:
            return True
        while not self.pool.available:
            youngest = self.running.pop()
            self._drop(youngest)
            insort(self.waiting, youngest)
            self.preemptions += 1
            if youngest is sequence:
                return False
        sequence.pages.append(self.pool.take())
        return True

    def _drop(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.computed = 0

    def _extend_digests(self, sequence: Sequence, pages: int) -> None:
        size = self.pool.page_size
        for index in range(len(sequence.digests), pages):
            parent = sequence.digests[-1] if sequence.digests else ROOT
            sequence.digests.append(chain(parent, sequence.tokens[index * size : (index + 1) * size]))
