"""The plan of a step: order, budget, shared prefixes, who gives way. What comes of it is test_loop.py's."""

from __future__ import annotations

from squawq.engine.pages import PagePool
from squawq.engine.scheduler import MAX_SCORED, Scheduler, Sequence


def scheduler(pages: int = 64, tokens: int = 8, sequences: int = 4, caching: bool = True) -> Scheduler:
    return Scheduler(PagePool(pages, 4), tokens, sequences, caching)


def run(planner: Scheduler) -> list[tuple[int, int]]:
    """A step as (arrival, tokens); every sequence whose tokens have all run gets one more."""
    shares = planner.plan()
    for sequence, count in shares:
        planner.advance(sequence, count)
        if not sequence.left:
            sequence.tokens.append(9)
            if len(sequence.tokens) >= sequence.limit:
                planner.end(sequence)
    planner.check()
    return [(sequence.arrival, count) for sequence, count in shares]


def test_decodes_first_then_prompts_by_arrival_in_chunks() -> None:
    planner = scheduler()
    planner.add(Sequence([1, 2], 40, arrival=0))
    assert run(planner) == [(0, 2)]
    planner.add(Sequence([3] * 9, 40, arrival=1))
    planner.add(Sequence([4] * 3, 40, arrival=2))
    assert run(planner) == [(0, 1), (1, 7)]
    assert run(planner) == [(0, 1), (1, 2), (2, 3)]
    assert run(planner) == [(0, 1), (1, 1), (2, 1)]


def test_the_youngest_gives_way_and_comes_back_in_its_place() -> None:
    planner = scheduler(pages=4, tokens=16)
    old, young, late = (Sequence([i] * 4, 12, arrival=i) for i in range(3))
    for sequence in (old, young, late):
        planner.add(sequence)
    assert run(planner) == [(0, 4), (1, 4)]  # a page each, and one more each; the third has to wait
    for _ in range(4):
        run(planner)
    assert run(planner) == [(0, 1)]
    assert (planner.preemptions, young.pages, young.computed) == (1, [], 0)
    assert [s.arrival for s in planner.waiting] == [1, 2]
    assert len(young.tokens) == 9


def test_a_sibling_waits_for_the_prompt() -> None:
    planner = scheduler()
    first = Sequence([1] * 12, 20, arrival=0)
    planner.add(first)
    planner.add(Sequence([1] * 12, 20, arrival=1, after=first))
    planner.add(Sequence([2] * 2, 20, arrival=2))
    assert run(planner) == [(0, 8)]
    assert run(planner) == [(0, 4), (2, 2)]
    assert run(planner) == [(0, 1), (2, 1), (1, 4)]  # of twelve tokens eight are found


def test_a_sibling_does_not_wait_for_one_that_ended() -> None:
    planner = scheduler()
    first = Sequence([1] * 12, 20, arrival=0)
    planner.add(first)
    planner.add(Sequence([1] * 12, 20, arrival=1, after=first))
    planner.end(first)
    assert run(planner) == [(1, 8)]


def test_scored_prompts_go_in_small_chunks_without_the_cache() -> None:
    planner = scheduler(pages=256, tokens=512)
    planner.add(Sequence([1] * 100, 200, arrival=0))
    run(planner)
    planner.add(Sequence([1] * 100, 200, arrival=1, score=True))
    assert run(planner) == [(0, 1), (1, MAX_SCORED)]
    assert planner.prefix_queries == 100


def test_without_caching_nothing_is_found() -> None:
    planner = scheduler(caching=False, tokens=16)
    for arrival in range(2):
        planner.add(Sequence([1] * 8, 9, arrival=arrival))
    assert run(planner) == [(0, 8), (1, 8)]
    planner.add(Sequence([1] * 8, 9, arrival=2))
    assert run(planner) == [(2, 8)]
    assert planner.prefix_hits == 0


def test_rows_of_prompt_logprobs_are_bounded_in_a_step() -> None:
    planner = scheduler(pages=256, tokens=512, sequences=8)
    for arrival in range(3):
        planner.add(Sequence([arrival] * 40, 60, arrival=arrival, score=True))
    planner.add(Sequence([7] * 100, 120, arrival=3))
    assert run(planner) == [(0, 40), (1, MAX_SCORED - 40), (3, 100)]
