"""What must hold of pages and scheduler after every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from squawq.engine.pages import PagePool
from squawq.engine.scheduler import Scheduler


def check_pool(pool: PagePool, tables: Iterable[Sequence[int]]) -> None:
    """Every page is exactly one of free, idle, referenced, given all running page tables."""
    references = Counter(page for table in tables for page in table)
    assert all(pool._references[page] == references[page] for page in range(pool.num_pages))
    free, idle, held = set(pool._free), set(pool._idle), set(references)
    assert len(free) == len(pool._free), "a page is free twice"
    assert not free & idle and not free & held and not idle & held  # noqa: PT018
    assert free | idle | held == set(range(pool.num_pages)), "a page leaked"
    assert all(pool._digests[page] is not None for page in idle)
    assert all(pool._digests[page] is None for page in free)
    assert pool._found == {d: p for p, d in enumerate(pool._digests) if d is not None}


def check_scheduler(scheduler: Scheduler) -> None:
    """No page or slot is leaked or shared wrongly."""
    check_pool(scheduler.pool, (sequence.pages for sequence in scheduler.running))
    assert not any(sequence.pages or sequence.computed for sequence in scheduler.waiting)
    slots = [*(sequence.slot for sequence in scheduler.running), *scheduler._slots]
    assert sorted(slots) == list(range(scheduler._max_sequences))
    assert all(len(s.pages) * scheduler.pool.page_size >= s.computed for s in scheduler.running)
