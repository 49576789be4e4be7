"""Batch invariance: whatever runs beside a request, in whatever chunks, on however few pages, it gives what it gives
alone; every sequence ends once, every page comes back, and nobody waits for ever."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from fakes import EOS, VOCAB, AheadRunner, FakeRunner, FakeTokenizer, collect, expected, request
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check_scheduler

from squawq.backends.sampling import Chunk
from squawq.engine.config import EngineConfig
from squawq.engine.engine import Loop
from squawq.engine.request import FinishReason, Output, Request
from squawq.engine.sequence import RequestState

BLOCKS = ([1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9])  # pages that come after one another in any order
PREFIX = [7, 3, 9, 9, 1, 4, 30, 31, 2, 5, 6, 40]


@dataclass
class Visit:
    asked: Request
    arrives: int
    leaves: int | None


class Bench:
    """A loop driven by hand: `visit` queues, `step` steps and checks the pages."""

    def __init__(self, runner: FakeRunner, tokens: int = 32, sequences: int = 4, caching: bool = True) -> None:
        self.runner = runner
        self.room = min(runner.max_positions, runner.num_pages * runner.page_size)
        self.outputs: list[Output] = []
        self.loop = Loop(
            runner,
            EngineConfig(max_num_batched_tokens=tokens, max_num_seqs=sequences, prefix_caching=caching),
        )

    def visit(self, asked: Request) -> Request:
        self.loop.add(
            RequestState(
                asked,
                self.outputs.append,
                room=self.room,
                matcher=None,
                tokenizer=FakeTokenizer(),
                eos_ids=frozenset([EOS]),
            )
        )
        return asked

    def step(self) -> None:
        self.loop.step()
        check_scheduler(self.loop.scheduler)

    def finish(self, most: int = 10_000) -> dict[tuple[str, int], Output]:
        for _ in range(most):
            if not self.loop.requests:
                break
            self.step()
        assert not self.loop.requests, "a request does not end"
        assert self.loop.pool.available == self.runner.num_pages, "pages are gone"
        return collect(self.outputs)


@st.composite
def requests(draw: st.DrawFn, room: int) -> Request:
    blocks = [token for block in draw(st.lists(st.sampled_from(BLOCKS), max_size=4)) for token in block]
    shared = draw(st.sampled_from([blocks, PREFIX]))
    shared = shared[: draw(st.integers(0, len(shared)))]
    own = draw(st.lists(st.integers(1, VOCAB - 1), min_size=0 if shared else 1, max_size=8))
    n = draw(st.sampled_from([1, 1, 1, 2, 3]))
    asked = request(
        [*shared, *own][: room - 1],
        max_tokens=draw(st.one_of(st.none(), st.integers(1, 12))),
        temperature=draw(st.sampled_from([0.0, 0.7, 1.5])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.5])),
        seed=draw(st.integers(0, 3)),
        n=n,
        best_of=draw(st.sampled_from([None, n + 1])),
        stop=draw(st.sampled_from([(), ("abc",), ("ca", "bb")])),
        include_stop=draw(st.booleans()),
        logprobs=draw(st.sampled_from([None, 0, 3])),
        prompt_logprobs=draw(st.sampled_from([None, None, 2])),
    )
    return replace(
        asked,
        tenant=draw(st.sampled_from(["", "", "a", "b"])),
        group=draw(st.sampled_from([None, None, "g"])),
        cache_salt=draw(st.sampled_from(["", "", "s"])),
    )


@st.composite
def visits(draw: st.DrawFn, room: int) -> list[Visit]:
    when = st.integers(0, 12)
    leaves = st.one_of(st.none(), st.none(), when)
    return [Visit(draw(requests(room)), draw(when), draw(leaves)) for _ in range(draw(st.integers(1, 7)))]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_request_gives_what_it_gives_alone(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([FakeRunner, AheadRunner]))
    runner = kind(num_pages=data.draw(st.integers(2, 24)), max_positions=60)
    sequences = data.draw(st.integers(1, 5))
    tokens = 2 * sequences + data.draw(st.sampled_from([0, 1, 7, 30]))
    runner.cache_outputs, runner.shares_prefixes = data.draw(st.booleans()), data.draw(st.booleans())
    bench = Bench(runner, tokens, sequences, data.draw(st.booleans()))
    coming = data.draw(visits(bench.room))
    for step in range(26):
        for visit in coming:
            if visit.arrives == step:
                bench.visit(visit.asked)
        for visit in coming:
            if visit.leaves is not None and visit.arrives + visit.leaves == step:
                bench.loop.abort(visit.asked.id)
        bench.step()
    work = sum(v.asked.params.sequences * bench.room for v in coming)
    found = bench.finish(most=2 * work)  # alone, one after the other, it would be `work` at most
    for visit in coming:
        given_up = visit.leaves is not None
        for index, whole in enumerate(expected(visit.asked, bench.room)):
            output = found.pop((visit.asked.id, index))
            if given_up and output.finish == FinishReason.ABORT:
                if visit.asked.params.sequences == visit.asked.params.n:
                    assert output.ids == whole.ids[: len(output.ids)]
            elif not given_up:
                assert output == whole
    assert not found
    assert all(sum(len(chunk.ids) for chunk in step) <= tokens for step in runner.steps)
    slots = [[chunk.slot for chunk in step] for step in runner.steps]
    assert all(len(set(step)) == len(step) and set(step) <= set(range(sequences)) for step in slots)
    if not runner.cache_outputs:
        assert not any(runs_outputs_as_a_prompt(chunk) for step in runner.steps for chunk in step)


def runs_outputs_as_a_prompt(chunk: Chunk) -> bool:
    sequence = chunk.sampling or chunk.again
    return sequence is not None and chunk.start + len(chunk.ids) > max(len(sequence.prompt), chunk.start + 1)


@pytest.mark.parametrize("kind", [FakeRunner, AheadRunner])
def test_after_a_preemption_generated_tokens_run_one_by_one(kind: type[FakeRunner]) -> None:
    runner = kind(num_pages=8)
    runner.cache_outputs = False
    bench = Bench(runner, sequences=4)
    asked = [bench.visit(request([i, i, i], max_tokens=25, ignore_eos=True, seed=1)) for i in range(1, 5)]
    found = bench.finish()
    assert bench.loop.scheduler.preemptions > 0
    assert any(chunk.again for step in runner.steps for chunk in step)
    assert all(len(chunk.ids) == 1 or chunk.start + len(chunk.ids) <= 3 for step in runner.steps for chunk in step)
    for one in asked:
        assert found[one.id, 0] == expected(one, bench.room)[0]


def test_a_preempted_sequence_takes_its_own_tokens_from_no_cached_prompt() -> None:
    runner = FakeRunner(num_pages=9)
    runner.cache_outputs = False
    bench = Bench(runner, sequences=4)
    first = bench.visit(request([1, 2, 3, 4], max_tokens=14, ignore_eos=True))
    tokens = [1, 2, 3, 4, *expected(first, bench.room)[0].ids]
    for _ in range(10):
        bench.step()
    bench.visit(request(tokens[:13], max_tokens=1))  # has its output as a prompt, and caches it
    bench.step()
    bench.loop.scheduler._preempt(bench.loop.scheduler.running.pop(0))
    count = len(runner.steps)
    found = bench.finish()
    assert found[first.id, 0] == expected(first, bench.room)[0]
    resumed = [chunk for step in runner.steps[count:] for chunk in step if chunk.again and chunk.start == 4]
    assert resumed


def test_a_runner_whose_pages_hold_only_part_of_a_sequence_caches_no_prefix() -> None:
    runner = FakeRunner(num_pages=8)
    runner.shares_prefixes = False
    bench = Bench(runner, sequences=4)
    asked = [bench.visit(request([*PREFIX[:6], i], max_tokens=20, ignore_eos=True, seed=1)) for i in range(4)]
    found = bench.finish()
    scheduler = bench.loop.scheduler
    assert scheduler.preemptions > 0
    assert scheduler.prefix_queries == 0
    for one in asked:
        assert found[one.id, 0] == expected(one, bench.room)[0]


@pytest.mark.parametrize("kind", [FakeRunner, AheadRunner])
def test_pages_run_out_and_all_end_as_alone(kind: type[FakeRunner]) -> None:
    bench = Bench(kind(num_pages=8), sequences=4)
    asked = [bench.visit(request([i, i, i], max_tokens=25, ignore_eos=True, seed=1)) for i in range(1, 5)]
    found = bench.finish()
    assert bench.loop.scheduler.preemptions > 0
    for one in asked:
        assert found[one.id, 0] == expected(one, bench.room)[0]


def test_a_cached_prefix_is_not_computed_again() -> None:
    bench = Bench(FakeRunner())
    bench.visit(request(PREFIX, max_tokens=1))
    bench.finish()
    bench.visit(request([*PREFIX, 8], max_tokens=1))
    bench.finish()
    assert [chunk.start for step in bench.runner.steps for chunk in step] == [0, 12]
    assert bench.loop.scheduler.prefix_hits == 12
    bench.visit(request(PREFIX, max_tokens=1))  # one token must run, so the last page is computed anew
    bench.finish()
    assert bench.runner.steps[-1][0].start == 8


@pytest.mark.parametrize(("cached", "start"), [(True, 20), (False, 12)])
def test_generated_tokens_are_cached_where_they_have_the_bits_of_a_prompt(cached: bool, start: int) -> None:
    runner = FakeRunner()
    runner.cache_outputs = cached
    bench = Bench(runner)
    first = bench.visit(request(PREFIX, max_tokens=10, ignore_eos=True))
    ids = bench.finish()[first.id, 0].ids
    assert len(ids) == 10
    bench.visit(request([*PREFIX, *ids], max_tokens=1))
    bench.finish()
    assert runner.steps[-1][0].start == start


def test_prompt_logprobs_do_not_read_the_cache_and_siblings_do() -> None:
    bench = Bench(FakeRunner())
    bench.visit(request(PREFIX, max_tokens=1))
    bench.finish()
    asked = bench.visit(request([*PREFIX, 8], max_tokens=2, n=3, prompt_logprobs=1, temperature=1.0, seed=0))
    found = bench.finish()
    first, second = bench.runner.steps[1], bench.runner.steps[2]
    assert sorted((chunk.start, chunk.logits) for chunk in first) == [(0, 13), (12, 1), (12, 1)]
    assert [chunk.start for chunk in second] == [13, 13, 13]
    assert [found[asked.id, i] for i in range(3)] == expected(asked, bench.room)


def test_prompt_logprobs_that_were_interrupted_go_on_where_they_were() -> None:
    bench = Bench(FakeRunner(num_pages=8), tokens=4, sequences=2)
    bench.visit(request([5] * 7, max_tokens=20, ignore_eos=True))
    for _ in range(2):
        bench.step()
    asked = bench.visit(request(list(range(10, 28)), max_tokens=2, ignore_eos=True, prompt_logprobs=2))
    found = bench.finish()
    assert bench.loop.scheduler.preemptions == 1
    assert [chunk.start for step in bench.runner.steps for chunk in step if chunk.logits > 1].count(0) == 2
    assert found[asked.id, 0] == expected(asked, bench.room)[0]


def test_a_long_prompt_does_not_hold_up_a_decode_nor_decodes_a_prompt() -> None:
    bench = Bench(FakeRunner(), tokens=4, sequences=2)
    bench.visit(request([5], max_tokens=60, ignore_eos=True))
    bench.step()
    bench.visit(request([6] * 40, max_tokens=2, ignore_eos=True))
    for _ in range(14):
        bench.step()
    assert all(len(step) == 2 for step in bench.runner.steps[1:15])
    assert [len(chunk.ids) for chunk in bench.runner.steps[5]] == [1, 3]


def test_first_come_first_served() -> None:
    bench = Bench(FakeRunner(num_pages=10), sequences=3)
    asked = [bench.visit(request([i] * size, max_tokens=3, ignore_eos=True)) for i, size in enumerate((20, 30, 2), 1)]
    bench.finish()
    ends = [output.request for output in bench.outputs if output.finish]
    assert ends == [one.id for one in asked]


def test_the_next_step_starts_before_the_results_of_this_one() -> None:
    runner = AheadRunner()
    bench = Bench(runner)
    asked = [bench.visit(request([i], max_tokens=9, ignore_eos=True, seed=1)) for i in (3, 4)]
    found = bench.finish()
    assert runner.ahead == len(runner.steps) - 1 == 8  # none runs in vain: the length is known
    for one in asked:
        assert found[one.id, 0] == expected(one, bench.room)[0]
    runner.ahead = 0
    scored = bench.visit(request(PREFIX, max_tokens=3, ignore_eos=True, prompt_logprobs=1))
    assert bench.finish()[scored.id, 0] == expected(scored, bench.room)[0]
    assert runner.ahead == 1  # not while the prompt is scored


@pytest.mark.parametrize("late", [False, True])
def test_a_step_started_ahead_that_fails_ends_its_requests(late: bool) -> None:
    """Pages that it should have filled are not found by others."""
    runner = AheadRunner()
    bench = Bench(runner)
    asked = bench.visit(request(PREFIX, max_tokens=9, ignore_eos=True))
    if not late:
        bench.step()

    def fail(_: object) -> None:
        raise RuntimeError("the model broke")

    if late:
        runner.known = fail
    else:
        runner.fail = fail
    found = bench.finish()[asked.id, 0]
    assert (found.finish, found.stop_reason) == (FinishReason.ERROR, "the model broke")
    runner.known = runner.fail = lambda _: None
    if late:
        runner._memory[:] = 0
    again = bench.visit(request([*PREFIX, 3], max_tokens=4))
    assert bench.finish()[again.id, 0] == expected(again, bench.room)[0]


def test_a_failing_step_ends_its_batch_and_no_other() -> None:
    bench = Bench(FakeRunner(), tokens=4, sequences=1)
    first, second = (bench.visit(request([i], max_tokens=4)) for i in (3, 4))

    def fail(_: object) -> None:
        raise RuntimeError("the model broke")

    bench.runner.fail = fail
    bench.step()
    bench.runner.fail = lambda _: None
    found = bench.finish()
    assert (found[first.id, 0].finish, found[first.id, 0].stop_reason) == (FinishReason.ERROR, "the model broke")
    assert found[second.id, 0] == expected(second, bench.room)[0]


def test_a_row_without_numbers_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(FakeRunner())
    bad, good = (bench.visit(request([i], max_tokens=4, n=2, temperature=1.0, seed=1)) for i in (3, 4))
    run = bench.runner.run

    def broken(batch):  # type: ignore[no-untyped-def]
        rows = run(batch)
        for chunk, row in zip(batch, rows, strict=True):
            if chunk.start == 0 and chunk.ids[0] == 3:
                row[:] = float("nan")
        return rows

    monkeypatch.setattr(bench.runner, "run", broken)
    found = bench.finish()
    for index in range(2):
        assert found[bad.id, index].finish == FinishReason.ERROR
        assert "not finite" in str(found[bad.id, index].stop_reason)
        assert found[good.id, index] == expected(good, bench.room)[index]


def test_a_sink_that_raises_has_hung_up() -> None:
    bench = Bench(FakeRunner())
    bench.outputs = Broken()
    bench.visit(request([3], max_tokens=9, n=2))
    kept: list[Output] = []
    bench.outputs = kept
    good = bench.visit(request([4], max_tokens=9))
    found = bench.finish()
    assert list(found) == [(good.id, 0)]
    assert found[good.id, 0] == expected(good, bench.room)[0]


class Broken(list[Output]):
    def append(self, _: Output) -> None:
        raise ConnectionResetError


def test_best_of_gives_the_best_at_the_end() -> None:
    bench = Bench(FakeRunner(), sequences=8)
    asked = bench.visit(request([3], max_tokens=6, n=2, best_of=6, temperature=2.0, seed=5, logprobs=0))
    found = bench.finish()
    assert len(bench.outputs) == 2
    means = [sum(p.logprob for p in found[asked.id, i].logprobs or ()) / len(found[asked.id, i].ids) for i in (0, 1)]
    assert means == sorted(means, reverse=True)
    assert [found[asked.id, i] for i in (0, 1)] == expected(asked, bench.room)
