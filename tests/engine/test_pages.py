"""Pages are free, idle or referenced, never two at once; a prefix is found by all its tokens; the oldest is evicted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check_pool

from squawq.engine.pages import ROOT, PagePool, chain


def test_a_digest_is_of_all_tokens_up_to_its_end() -> None:
    first = chain(ROOT, [1, 2])
    assert chain(first, [3, 4]) == chain(chain(ROOT, [1, 2]), [3, 4])
    assert chain(first, [3, 4]) != chain(chain(ROOT, [2, 1]), [3, 4])
    assert chain(first, [3, 4]) != chain(ROOT, [3, 4])


def test_idle_pages_are_found_until_they_are_evicted_a_prefix_last() -> None:
    pool = PagePool(3, 2)
    digests = [chain(ROOT, [1, 2])]
    digests.append(chain(digests[0], [3, 4]))
    pages = [pool.take(), pool.take()]
    for page, digest in zip(pages, digests, strict=True):
        pool.register(page, digest)
    pool.release(pages)
    assert pool.match(digests) == pages
    assert (pool.available, pool.idle(pages)) == (3, 2)
    pool.take()
    pool.take()
    assert pool.match(digests) == pages[:1]
    assert pool.match(digests[1:]) == []


def test_a_page_that_two_share_stays_until_both_let_go() -> None:
    pool = PagePool(2, 2)
    page = pool.take()
    pool.register(page, chain(ROOT, [1, 2]))
    pool.share([page])
    pool.release([page])
    check_pool(pool, [[page]])
    assert pool.available == 1
    pool.release([page])
    check_pool(pool, [])
    assert pool.available == 2


@pytest.mark.parametrize(("tokens", "pages"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert PagePool(9, 4).pages_for(tokens) == pages


def test_check_sees_what_is_wrong() -> None:
    pool = PagePool(2, 2)
    page = pool.take()
    with pytest.raises(AssertionError):
        check_pool(pool, [])
    with pytest.raises(AssertionError):
        check_pool(pool, [[page], [page]])
    with pytest.raises(AssertionError):
        check_pool(pool, [[page + 1]])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "find", "release"]), st.integers(0, 5)), max_size=60))
def test_no_order_of_calls_loses_a_page(calls: list[tuple[str, int]]) -> None:
    pool = PagePool(5, 2)
    tables: list[list[int]] = []
    for call, number in calls:
        if call == "take" and pool.available:
            tables.append([pool.take()])
            pool.register(tables[-1][0], chain(ROOT, [number, number]))
        elif call == "find" and (found := pool.match([chain(ROOT, [number, number])])):
            pool.share(found)
            tables.append(found)
        elif call == "release" and tables:
            pool.release(tables.pop(number % len(tables)))
        check_pool(pool, tables)
