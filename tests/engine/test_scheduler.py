"""The plan of a step: turns, budget, shared prefixes, who gives way. What comes of it is test_loop.py's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check_scheduler

from squawq.engine.pages import PagePool
from squawq.engine.scheduler import MAX_SCORED, Scheduler, Sequence


@dataclass(eq=False)
class Named(Sequence):
    name: int = 0


def scheduler(pages: int = 64, tokens: int = 8, sequences: int = 4, caching: bool = True) -> Scheduler:
    return Scheduler(PagePool(pages, 4), tokens, sequences, caching)


def finish(planner: Scheduler, shares: list[tuple[Sequence, int]]) -> None:
    for sequence, count in shares:
        planner.advance(sequence, count)
        if not sequence.left:
            sequence.tokens.append(9)
            if len(sequence.tokens) >= sequence.limit:
                planner.end(sequence)
    check_scheduler(planner)


def run(planner: Scheduler) -> list[tuple[int, int]]:
    """A step as (name, tokens); every sequence whose tokens have all run gets one more."""
    shares = planner.plan()
    finish(planner, shares)
    return [(sequence.name, count) for sequence, count in shares if isinstance(sequence, Named)]


def test_decodes_first_then_prompts_in_order_in_chunks() -> None:
    planner = scheduler()
    planner.add(Named([1, 2], 40, name=0))
    assert run(planner) == [(0, 2)]
    planner.add(Named([3] * 9, 40, name=1))
    planner.add(Named([4] * 3, 40, name=2))
    assert run(planner) == [(0, 1), (1, 7)]
    assert run(planner) == [(0, 1), (1, 2), (2, 3)]
    assert run(planner) == [(0, 1), (1, 1), (2, 1)]


def test_the_last_gives_way_and_comes_back_in_its_place() -> None:
    planner = scheduler(pages=4, tokens=16)
    old, young, late = (Named([i] * 4, 12, name=i) for i in range(3))
    for sequence in (old, young, late):
        planner.add(sequence)
    assert run(planner) == [(0, 4), (1, 4)]  # a page each, and one more each; the third has to wait
    for _ in range(4):
        run(planner)
    assert run(planner) == [(0, 1)]
    assert (planner.preemptions, young.pages, young.computed) == (1, [], 0)
    assert planner.waiting == {young, late}
    assert len(young.tokens) == 9


def test_slots_are_released_at_a_preemption_and_at_the_end() -> None:
    released: list[int] = []
    planner = Scheduler(PagePool(4, 4), 8, 2, False, release=released.append)
    first, second, waiting = (Named([name] * 4, 12, name=name) for name in range(3))
    for sequence in (first, second, waiting):
        planner.add(sequence)
    while not planner.preemptions:
        finish(planner, planner.plan())
    assert released == [second.slot]
    planner.end(waiting)  # it never ran
    assert released == [second.slot]
    planner.end(first)
    assert released == [second.slot, first.slot]


def test_a_prompt_that_another_sequence_is_computing_is_waited_for() -> None:
    planner = scheduler()
    planner.add(Named([1] * 12, 20, name=0))
    planner.add(Named([1] * 12, 20, name=1))
    planner.add(Named([2] * 2, 20, name=2))
    assert run(planner) == [(0, 8)]
    assert run(planner) == [(0, 4), (1, 4)]  # of twelve tokens eight are found
    assert run(planner) == [(0, 1), (1, 1), (2, 2)]


def test_requests_that_share_a_prefix_compute_it_once() -> None:
    planner = scheduler(pages=256, tokens=16, sequences=8)
    for request in range(8):
        planner.add(Named([1] * 64 + [2 + request] * 4, 69, name=request, group=str(request)))
    computed = 0
    while planner.running or planner.waiting:
        computed += sum(count for _, count in run(planner))
    assert computed == 64 + 8 * 4


def test_nothing_waits_for_a_prompt_that_ended() -> None:
    planner = scheduler()
    first = Named([1] * 12, 20, name=0)
    planner.add(first)
    planner.add(Named([1] * 12, 20, name=1))
    planner.end(first)
    assert run(planner) == [(1, 8)]


def test_scored_prompts_go_in_small_chunks_without_the_cache() -> None:
    planner = scheduler(pages=256, tokens=512)
    planner.add(Named([1] * 100, 200, name=0))
    run(planner)
    planner.add(Named([1] * 100, 200, name=1, score=True))
    assert run(planner) == [(0, 1), (1, MAX_SCORED)]
    assert planner.prefix_queries == 100


def test_without_caching_nothing_is_found() -> None:
    planner = scheduler(caching=False, tokens=16)
    for arrival in range(2):
        planner.add(Named([1] * 8, 9, name=arrival))
    assert run(planner) == [(0, 8), (1, 8)]
    planner.add(Named([1] * 8, 9, name=2))
    assert run(planner) == [(2, 8)]
    assert planner.prefix_hits == 0


def test_rows_of_prompt_logprobs_are_bounded_in_a_step() -> None:
    planner = scheduler(pages=256, tokens=512, sequences=8)
    for arrival in range(3):
        planner.add(Named([arrival] * 40, 60, name=arrival, score=True))
    planner.add(Named([7] * 100, 120, name=3))
    assert run(planner) == [(0, 40), (1, MAX_SCORED - 40), (3, 100)]


def names(planner: Scheduler) -> list[int]:
    return [sequence.name for sequence in planner.running if isinstance(sequence, Named)]


def test_another_tenant_takes_the_place_of_the_last_of_who_holds_most() -> None:
    planner = scheduler(pages=256, tokens=16)
    for name in range(20):
        planner.add(Named([name] * 4, 200, name=name, tenant="a", group="r"))
    for _ in range(9):
        run(planner)
    assert names(planner) == [0, 1, 2, 3]
    planner.add(Named([50] * 4, 6, name=50, tenant="b"))
    assert run(planner) == [(0, 1), (1, 1), (2, 1), (50, 4)]
    assert planner.preemptions == 1
    assert run(planner) == [(0, 1), (50, 1), (1, 1), (2, 1)]
    assert (3, 1) in run(planner)  # all that it had computed but its last page is found


def test_another_request_of_the_tenant_takes_turns_with_the_first() -> None:
    planner = scheduler(pages=256, tokens=16)
    for name in range(20):
        planner.add(Named([name] * 4, 200, name=name, group="r"))
    run(planner)
    for name in (50, 51):
        planner.add(Named([name] * 4, 200, name=name, group=str(name)))
    run(planner)
    assert names(planner) == [0, 50, 51, 1]


def test_with_more_tenants_than_slots_each_has_its_turn() -> None:
    planner = scheduler(sequences=1, tokens=8)
    for name, tenant, request in ((0, "a", "r"), (1, "a", "r"), (2, "a", "s"), (3, "b", "r"), (4, "c", "r")):
        planner.add(Named([name] * 4, 6, name=name, tenant=tenant, group=request))
    order = [name for _ in range(10) for name, _ in run(planner)]
    assert list(dict.fromkeys(order)) == [0, 3, 4, 2, 1]


def test_pages_are_taken_from_who_comes_later() -> None:
    planner = scheduler(pages=16, tokens=64)
    for name in range(3):
        planner.add(Named([name] * 16, 20, name=name, tenant="a"))
    run(planner)
    planner.add(Named([50] * 20, 24, name=50, tenant="b"))
    run(planner)
    assert names(planner) == [0, 50, 1]
    assert planner.preemptions == 1


def test_nobody_gives_way_in_vain() -> None:
    planner = scheduler(pages=16, tokens=64)
    for name in range(3):
        planner.add(Named([name] * 16, 20, name=name, tenant="a"))
    run(planner)
    planner.add(Named([50] * 52, 60, name=50, tenant="b"))
    planner.add(Named([60] * 3, 9, name=60, tenant="c"))
    run(planner)
    assert names(planner) == [0, 60, 1, 2]  # the first of c, which is small, overtakes that of b
    assert planner.preemptions == 0


def test_a_long_prompt_leaves_half_a_step_to_another_tenant() -> None:
    planner = scheduler(pages=256, tokens=16)
    planner.add(Named([1] * 200, 220, name=1, tenant="a"))
    run(planner)
    planner.add(Named([2] * 20, 30, name=2, tenant="b"))
    assert run(planner) == [(1, 8), (2, 8)]
    planner.add(Named([3] * 2, 30, name=3, tenant="c"))
    assert sorted(run(planner)) == [(1, 7), (2, 7), (3, 2)]  # what c leaves is for both


def test_a_long_prompt_takes_turns_with_another_request_of_its_tenant() -> None:
    planner = scheduler(pages=256, tokens=16)
    planner.add(Named([1] * 200, 220, name=1, group="long"))
    run(planner)
    planner.add(Named([2] * 6, 30, name=2, group="short"))
    assert run(planner) == [(1, 16)]  # its turn had begun
    assert run(planner) == [(1, 10), (2, 6)]


def test_scored_prompts_are_shared_evenly_too() -> None:
    planner = scheduler(pages=256, tokens=512)
    for name in range(3):
        planner.add(Named([name] * 100, 200, name=name, tenant="a", score=True))
    planner.add(Named([9] * 40, 200, name=9, tenant="b", score=True))
    assert run(planner) == [(0, MAX_SCORED // 2), (9, MAX_SCORED // 2)]


def test_roots_part_the_cache() -> None:
    planner = scheduler(pages=64, tokens=64)
    for root, hits in ((b"a", 0), (b"b", 0), (b"a", 8)):
        before = planner.prefix_hits
        planner.add(sequence := Sequence([1] * 9, 10, root=root))
        run(planner)
        assert sequence.ended
        assert planner.prefix_hits - before == hits


@dataclass
class Coming:
    step: int
    tenant: str
    request: str
    prompt: int
    output: int
    count: int


COMING = st.builds(
    Coming,
    step=st.integers(0, 12),
    tenant=st.sampled_from("abc"),
    request=st.sampled_from("rstu"),
    prompt=st.integers(1, 30),
    output=st.integers(1, 12),
    count=st.integers(1, 9),
)


def arrive(planner: Scheduler, coming: list[Coming], step: int) -> list[Sequence]:
    sequences = [
        Sequence([one.prompt] * one.prompt, one.prompt + one.output, tenant=one.tenant, group=one.request)
        for one in coming
        if one.step == step
        for _ in range(one.count)
    ]
    for sequence in sequences:
        planner.add(sequence)
    return sequences


def awaits(planner: Scheduler, sequence: Sequence) -> bool:
    """Whether a running sequence is computing the page that a waiting one needs next."""
    computing = {digest for other in planner.running for digest in other.digests[other.computed // 4 :]}
    needed = sequence.digests[: (len(sequence.tokens) - 1) // 4]
    return bool(computing.intersection(needed[len(planner.pool.match(needed)) :][:1]))


@settings(max_examples=60, deadline=None)
@given(st.lists(COMING, max_size=8), st.booleans(), st.integers(1, 6))
def test_slots_and_prompts_are_shared_evenly(coming: list[Coming], caching: bool, slots: int) -> None:
    planner = scheduler(pages=1000, tokens=3 * slots, sequences=slots, caching=caching)
    for step in range(30):
        arrive(planner, coming, step)
        shares = planner.plan()
        for key in (lambda s: s.tenant, lambda s: (s.tenant, s.group)):
            holds = Counter(map(key, planner.running))
            for other in {key(sequence) for sequence in planner.waiting if not awaits(planner, sequence)}:
                rivals = [n for name, n in holds.items() if isinstance(name, str) or name[0] == other[0]]
                assert max(rivals, default=0) <= holds[other] + 1
        prompts: Counter[str] = Counter()
        wanted: Counter[str] = Counter()
        for sequence in planner.running:
            if sequence.left > 1:
                wanted[sequence.tenant] += sequence.left
        for sequence, count in shares:
            prompts[sequence.tenant] += count if sequence.left > 1 else 0
        budget = 3 * slots - sum(sequence.left == 1 for sequence, _ in shares)
        assert all(prompts[name] >= min(want, budget // len(wanted)) for name, want in wanted.items())
        finish(planner, shares)


@settings(max_examples=60, deadline=None)
@given(st.lists(COMING, max_size=8), st.booleans(), st.integers(2, 6), st.integers(1, 40), st.integers(1, 10))
def test_a_small_request_ends_soon_whatever_another_tenant_has_under_way(
    coming: list[Coming], caching: bool, slots: int, prompt: int, output: int
) -> None:
    """Its steps are counted by its own size: a prompt in half of what decodes leave, then a step a token."""
    planner = scheduler(pages=1000, tokens=2 * slots + 2, sequences=slots, caching=caching)
    for one in coming:
        one.tenant, one.step = "a", min(one.step, 9)
    small = Sequence([99] * prompt, prompt + output, tenant="b")
    for step in range(10):
        arrive(planner, coming, step)
        finish(planner, planner.plan())
    planner.add(small)
    for _ in range(-(-prompt // ((slots + 2) // 2)) + output - 1):
        shares = planner.plan()
        assert small.pages or small.ended
        finish(planner, shares)
    assert small.ended


@settings(max_examples=80, deadline=None)
@given(st.lists(COMING, min_size=1, max_size=8), st.booleans(), st.integers(1, 6), st.integers(11, 40))
def test_all_end_and_the_first_is_never_put_back(coming: list[Coming], caching: bool, slots: int, pages: int) -> None:
    planner = scheduler(pages=pages, tokens=2 * slots, sequences=slots, caching=caching)
    live: list[Sequence] = []
    first, most = None, 12 + sum(one.count * (one.prompt + one.output) for one in coming)
    for step in range(2 * most):
        live += arrive(planner, coming, step)
        shares = planner.plan()
        assert bool(shares) == bool(live)
        if live:
            assert first is None or first.ended or planner.running[0] is first
            first = planner.running[0]
        finish(planner, shares)
        live = [sequence for sequence in live if not sequence.ended]
        if not live and step > 12:
            return
    raise AssertionError("a sequence does not end")
