"""The scheduler: which tokens of which sequences run in the next step, and on which pages. Plain Python, no tensors.

Continuous batching (Yu et al., Orca, OSDI 2022) and chunked prefill (Agrawal et al., arXiv 2308.16369) over a paged KV
cache (Kwon et al., arXiv 2309.06180). Tenants are served round robin, as fair queueing does (Nagle, RFC 970).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from squawq.engine.pages import ROOT, PagePool, chain

MAX_SCORED = 64  # rows of logits per step for prompt logprobs: 39 MB with a vocabulary of 152k (float32)


@dataclass(eq=False)
class Sequence:
    """One sequence, as the scheduler sees it."""

    tokens: list[int]  # prompt and output
    limit: int  # most tokens, prompt included
    tenant: str = ""
    group: str = ""  # the request; or `Request.group`
    root: bytes = ROOT  # parent digest of its first page (pages.root)
    score: bool = False  # compute prompt logprobs, so do not read the prefix cache
    computed: int = 0  # tokens whose keys and values are in `pages`, or will be when the started steps have run
    pending: int = 0  # tokens that started steps will sample
    registered: int = 0  # pages that are in the prefix cache
    pages: list[int] = field(default_factory=list)
    slot: int = 0  # `Chunk.slot`, while it has pages
    digests: list[bytes] = field(default_factory=list)  # of the full pages of `tokens`
    ended: bool = False
    prompt: int = field(init=False)  # tokens of the prompt

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens, those included that started steps will sample."""
        return len(self.tokens) + self.pending

    @property
    def left(self) -> int:
        """Tokens still to run before the next can be sampled."""
        return self.length - self.computed


@dataclass(eq=False)
class _Group:
    """A request's unfinished sequences, in order."""

    turn: int  # prefill order among its tenant's requests, lowest first
    sequences: list[Sequence] = field(default_factory=list)
    ran: int = 0  # prompt tokens scheduled in this turn


class Turns:
    """Round-robin order of sequences: the first of each tenant, then the second of each, and so on; in a tenant, the
    first of each request, then the second of each.

    Tenants and requests are in order of arrival; one whose first sequence ends moves to the back. So the very first
    sequence stays first until it ends, and every other one becomes first eventually.
    """

    def __init__(self, quantum: int) -> None:
        self._tenants: dict[str, dict[str, _Group]] = {}
        self._quantum = quantum  # prompt tokens per prefill turn
        self._count = 0

    def add(self, sequence: Sequence) -> None:
        """Add a sequence after the others of its request."""
        groups = self._tenants.setdefault(sequence.tenant, {})
        if sequence.group not in groups:
            groups[sequence.group] = _Group(self._next_turn())
        groups[sequence.group].sequences.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        groups = self._tenants[sequence.tenant]
        group = groups[sequence.group]
        first = group.sequences[0] is sequence
        foremost = first and next(iter(groups.values())) is group
        group.sequences.remove(sequence)
        if first:
            del groups[sequence.group]
        if foremost:
            del self._tenants[sequence.tenant]
        if group.sequences:
            groups[sequence.group] = group
        if groups:
            self._tenants[sequence.tenant] = groups

    def by_tenant(self, ready: Callable[[Sequence], bool]) -> list[Iterator[Sequence]]:
        """For each tenant in order, an iterator over its sequences that are ready, in order."""
        return [_round_robin(filter(ready, g.sequences) for g in groups.values()) for groups in self._tenants.values()]

    def prompt_turn(self, sequence: Sequence) -> int:
        """The prefill turn of a sequence's request: of a tenant's requests, the lowest goes first."""
        return self._tenants[sequence.tenant][sequence.group].turn

    def ran(self, sequence: Sequence, count: int) -> None:
        """Count prompt tokens that are scheduled; after `quantum` of them the request's next turn comes last."""
        group = self._tenants[sequence.tenant][sequence.group]
        group.ran += count
        if group.ran >= self._quantum:
            group.turn, group.ran = self._next_turn(), 0

    def _next_turn(self) -> int:
        self._count += 1
        return self._count


def _round_robin(iterators: Iterable[Iterator[Sequence]]) -> Iterator[Sequence]:
    """The first of each, then the second of each, and so on."""
    left = deque(iterators)
    while left:
        iterator = left.popleft()
        if sequence := next(iterator, None):
            yield sequence
            left.append(iterator)


class Scheduler:
    """Plans steps of at most `max_tokens` tokens of at most `max_sequences` sequences.

    Fairness: the order of `Turns` alone decides which sequences run. A waiting sequence preempts running ones
    that come later, the last first; they wait again, and find their pages in the prefix cache. So tenants share the
    `max_sequences` evenly, and so do a tenant's requests. A tenant's first sequence starts with the next step, unless
    there are more tenants than `max_sequences` or earlier tenants' first sequences hold the pages. Only other tenants
    may overtake a sequence that does not fit.

    cache_outputs: whether pages with generated tokens enter the prefix cache, too. If not, a preempted sequence
    runs those tokens again one at a step, as it did before.

    release: called with the slot of a running sequence that ends or is preempted.

    Prefix caching: a sequence waits while an earlier one computes the next page of the same prompt, and then uses it.

    Budget: decodes are planned first and take at most half of a step, since max_tokens >= 2 * max_sequences, so neither
    decodes nor prompts starve. Tenants in prefill share the rest evenly; a tenant's requests take turns of max_tokens
    tokens each.

    Progress: the first sequence is never preempted, each step runs some of its tenant's tokens, and every sequence
    becomes first; so all finish.
    """

    def __init__(
        self,
        pool: PagePool,
        max_tokens: int,
        max_sequences: int,
        prefix_caching: bool,
        *,
        cache_outputs: bool = True,
        release: Callable[[int], object] = lambda _: None,
    ) -> None:
        assert max_tokens >= 2 * max_sequences
        self.pool = pool
        self.running: list[Sequence] = []  # in the order of the last plan
        self.waiting: set[Sequence] = set()
        self.preemptions = self.prefix_queries = self.prefix_hits = 0
        self._turns = Turns(max_tokens)
        self._max_tokens, self._max_sequences, self._caching = max_tokens, max_sequences, prefix_caching
        self._cache_outputs, self._release = cache_outputs, release
        self._slots = list(range(max_sequences - 1, -1, -1))  # the free ones

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose `limit` tokens fit into the pool."""
        assert sequence.prompt < sequence.limit <= self.pool.num_pages * self.pool.page_size
        self._turns.add(sequence)
        self.waiting.add(sequence)

    def end(self, sequence: Sequence) -> None:
        """Remove a sequence, at any time, and release its pages."""
        if not sequence.ended:
            sequence.ended = True
            (self.running if sequence.pages else self.waiting).remove(sequence)
            self._turns.remove(sequence)
            self._drop(sequence)

    def plan(self) -> list[tuple[Sequence, int]]:
        """The next step: sequences, and how many of their tokens after `computed` to run."""
        self._take_turns()
        decodes = [s for s in list(filter(self._decodes, self.running)) if s.pages and self._grow(s)]
        wanted = {s: self._prompt_left(s) for s in self.running if s.left > 1 and not self._decodes(s)}
        if scored := {s: count for s, count in wanted.items() if s.score}:
            wanted |= self._split(scored, max(MAX_SCORED, len(scored)))
        prompts = self._split(wanted, self._max_tokens - len(decodes))
        for sequence, count in prompts.items():
            self._turns.ran(sequence, count)
        return [(s, 1) for s in decodes] + [(s, prompts[s]) for s in wanted if prompts[s]]

    def _decodes(self, sequence: Sequence) -> bool:
        """Whether a sequence's next step is one generated token."""
        if sequence.left == 1:
            return sequence.length < sequence.limit
        return not self._cache_outputs and sequence.left > 1 and sequence.computed >= sequence.prompt

    def _prompt_left(self, sequence: Sequence) -> int:
        """Tokens that a sequence may run as a prompt."""
        return sequence.left if self._cache_outputs else min(sequence.left, sequence.prompt - sequence.computed)

    def advance(self, sequence: Sequence, count: int) -> None:
        """Count `count` more tokens as computed; full pages of known tokens enter the prefix cache."""
        sequence.computed += count
        if self._caching:
            known = min(sequence.computed, len(sequence.tokens) if self._cache_outputs else sequence.prompt)
            full = known // self.pool.page_size
            self._extend_digests(sequence, full)
            for index in range(sequence.registered, full):
                self.pool.register(sequence.pages[index], sequence.digests[index])
            sequence.registered = max(sequence.registered, full)

    def _take_turns(self) -> None:
        """Admit waiting sequences in the order of `Turns`, preempting running ones that come later."""
        kept: list[Sequence] = []
        coming: set[bytes] = set()  # digests of the pages that sequences in `kept` will compute
        later = dict.fromkeys(self.running)  # running ones not reached yet; the last is preempted first

        def ready(sequence: Sequence) -> bool:
            if sequence.pages:
                return True
            return not sequence.pending and (not coming or self._cached(sequence)[1] not in coming)

        tenants = deque(self._turns.by_tenant(ready))
        while tenants and len(kept) < self._max_sequences:
            sequences = tenants.popleft()
            sequence = next(sequences, None)
            if sequence is None:
                continue
            if sequence.pages:
                del later[sequence]
            elif not self._admit(sequence, kept, later):
                continue  # drops its tenant, whose other sequences may not overtake it
            kept.append(sequence)
            coming.update(sequence.digests[sequence.computed // self.pool.page_size :])
            tenants.append(sequences)
        self.running = [*kept, *later]

    def _cached(self, sequence: Sequence) -> tuple[list[int], bytes | None]:
        """A waiting sequence's cached pages, and the digest of the first page that is not cached."""
        if not self._caching:
            return [], None
        cached = len(sequence.tokens) if self._cache_outputs else sequence.prompt
        reusable = min(cached, len(sequence.tokens) - 1) // self.pool.page_size  # at least one token must run
        self._extend_digests(sequence, reusable)
        if sequence.score:
            return [], None
        pages = self.pool.match(sequence.digests[:reusable])
        return pages, sequence.digests[len(pages)] if len(pages) < reusable else None

    def _admit(self, sequence: Sequence, kept: list[Sequence], later: dict[Sequence, None]) -> bool:
        """Allocate pages for all tokens of a waiting sequence, keeping one page free for each running one.

        kept: running sequences that stay. later: those to preempt if that makes enough room. False if it does not fit.
        """
        shared, _ = self._cached(sequence)
        fresh = self.pool.pages_for(len(sequence.tokens)) - len(shared)

        def fits() -> bool:
            running = len(kept) + len(later)
            room = fresh + self.pool.idle(shared) + running <= self.pool.available
            return room and running < self._max_sequences

        if not fits():
            held = set(shared).union(*(other.pages for other in kept))  # preemption does not free these
            if not later or len(held) + fresh + len(kept) > self.pool.num_pages:
                return False
            while not fits():
                self._preempt(later.popitem()[0])
        self.pool.share(shared)
        sequence.pages = shared + [self.pool.take() for _ in range(fresh)]
        sequence.slot = self._slots.pop()
        sequence.registered = len(shared)
        sequence.computed = len(shared) * self.pool.page_size
        if self._caching and not sequence.score:
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += sequence.computed
        self.waiting.remove(sequence)
        return True

    def _split(self, wanted: Mapping[Sequence, int], budget: int) -> Counter[Sequence]:
        """Divide `budget` tokens: evenly among tenants, and among a tenant's requests in the order of their turns.

        What a tenant does not want goes to those that want more.
        """
        tenants: dict[str, list[Sequence]] = {}
        for sequence in sorted(wanted, key=self._turns.prompt_turn):
            tenants.setdefault(sequence.tenant, []).append(sequence)
        found: Counter[Sequence] = Counter()
        by_size = sorted(tenants.values(), key=lambda own: sum(wanted[s] for s in own))
        for place, own in enumerate(by_size):
            room = -(-budget // (len(by_size) - place))
            for sequence in own:
                found[sequence] = min(wanted[sequence], room)
                room -= found[sequence]
                budget -= found[sequence]
        return found

    def _grow(self, sequence: Sequence) -> bool:
        """Allocate a page for the next token if it needs one; False if the sequence itself was preempted."""
        if sequence.length <= len(sequence.pages) * self.pool.page_size:
            return True
        while not self.pool.available:
            last = self.running.pop()
            self._preempt(last)
            if last is sequence:
                return False
        sequence.pages.append(self.pool.take())
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._drop(sequence)
        self.waiting.add(sequence)
        self.preemptions += 1

    def _drop(self, sequence: Sequence) -> None:
        if sequence.pages:
            self._slots.append(sequence.slot)
            self._release(sequence.slot)
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.computed = sequence.registered = 0

    def _extend_digests(self, sequence: Sequence, pages: int) -> None:
        size = self.pool.page_size
        for index in range(len(sequence.digests), pages):
            parent = sequence.digests[-1] if sequence.digests else sequence.root
            sequence.digests.append(chain(parent, sequence.tokens[index * size : (index + 1) * size]))
