"""The engine from outside: many threads, checks before the queue, its bound, aborts, closing."""

from __future__ import annotations

import json
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from fakes import EOS, VOCAB, FakeRunner, HostRunner, collect, expected, request
from numpy.typing import NDArray

from squawq.backends.sampling import Chunk
from squawq.demo import demo_model
from squawq.engine import grammar as grammar_module
from squawq.engine.config import EngineConfig
from squawq.engine.engine import Engine
from squawq.engine.request import FinishReason, Grammar, Output, Request
from squawq.errors import ConfigError, EngineClosed, QueueFull
from squawq.text.tokenizer import Tokenizer

MakeEngine = Callable[..., Engine]
WAIT = 30.0  # seconds; only a test that fails waits so long


@pytest.fixture
def make() -> Iterator[MakeEngine]:
    made = []

    def engine(runner: FakeRunner | None = None, **options: object) -> Engine:
        made.append(Engine(runner or FakeRunner(), config=EngineConfig(**options), eos_ids=[EOS]))  # type: ignore[arg-type]
        return made[-1]

    yield engine
    for one in made:
        one.close()
        assert one.stats().pages_used == 0
        assert not one._live


class Gate:
    """Holds a runner's steps until it is opened."""

    def __init__(self, runner: FakeRunner) -> None:
        self._open, self.reached = threading.Event(), threading.Event()
        runner.fail = self._wait

    def _wait(self, _: object) -> None:
        self.reached.set()
        assert self._open.wait(WAIT)

    def open(self) -> None:
        self._open.set()


class Sink:
    """Keeps outputs and says when the last has come."""

    def __init__(self, sequences: int = 1) -> None:
        self.outputs: list[Output] = []
        self._left, self._ended = sequences, threading.Event()

    def __call__(self, output: Output) -> None:
        assert not self._ended.is_set(), "an output after the last"
        self.outputs.append(output)
        self._left -= output.finish is not None
        if not self._left:
            self._ended.set()

    def result(self) -> Output:
        assert self._ended.wait(WAIT)
        return next(iter(collect(self.outputs).values()))


def test_requests_from_many_threads_give_what_they_give_alone(make: MakeEngine) -> None:
    engine = make(FakeRunner(num_pages=20), max_num_seqs=5, max_num_batched_tokens=16)
    limits: list[dict[str, object]] = [{}, {"allowed_ids": list(range(5, 20))}, {"bad_ids": [[7], [9, 8], [3, 9, 1]]}]
    asked = [
        request([1, 2, 3, 4, i], max_tokens=9, temperature=1.0, seed=i, logprobs=1, **limits[i % 3]) for i in range(24)
    ]
    sinks = [Sink() for _ in asked]

    def client(first: int) -> None:
        for one, sink in list(zip(asked, sinks, strict=True))[first::4]:
            engine.submit(one, sink)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for one, sink in zip(asked, sinks, strict=True):
        assert sink.result() == expected_ids(one)
    for thread in threads:
        thread.join()


def expected_ids(asked: Request, room: int = 80) -> Output:
    """Without a tokenizer there is no text."""
    output = expected(asked, room)[0]
    return Output(output.request, 0, output.ids, "", output.logprobs, None, output.finish, output.stop_reason)


def test_generate_gives_all_outputs_though_the_queue_is_short(make: MakeEngine) -> None:
    engine = make(max_waiting=2, max_num_seqs=2, max_num_batched_tokens=8)
    asked = [request([i], max_tokens=4, n=2, ignore_eos=True) for i in range(1, 20)]
    found = collect(list(engine.generate(asked)))
    assert set(found) == {(one.id, index) for one in asked for index in range(2)}
    assert engine.stats().tokens_generated == 19 * 2 * 4


def test_leaving_generate_early_aborts(make: MakeEngine) -> None:
    engine = make()
    outputs = engine.generate([request([i], ignore_eos=True) for i in range(1, 4)])
    next(outputs)
    outputs.close()  # type: ignore[attr-defined]
    wait_until(lambda: not engine._live)


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.002)


def test_the_queue_is_bounded_and_empties(make: MakeEngine) -> None:
    runner = FakeRunner()
    gate = Gate(runner)
    engine = make(runner, max_num_seqs=1, max_num_batched_tokens=8, max_waiting=2)
    sinks = [Sink() for _ in range(4)]
    engine.submit(request([1], max_tokens=3), sinks[0])
    assert gate.reached.wait(WAIT)  # the first has begun and waits no more
    for sink in sinks[1:3]:
        engine.submit(request([2], max_tokens=3), sink)
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        engine.submit(request([3], max_tokens=3), sinks[3])
    gate.open()
    for sink in sinks[:3]:
        sink.result()
    engine.submit(request([3], max_tokens=3), sinks[3])
    sinks[3].result()


def test_an_aborted_request_leaves_the_queue(make: MakeEngine) -> None:
    runner = FakeRunner()
    gate = Gate(runner)
    engine = make(runner, max_num_seqs=1, max_num_batched_tokens=8, max_waiting=1)
    first, second, third = (Sink() for _ in range(3))
    engine.submit(request([1], max_tokens=30, ignore_eos=True), first)
    assert gate.reached.wait(WAIT)
    waiting = request([2])
    engine.submit(waiting, second)
    for _ in range(3):
        engine.abort(waiting.id)
    gate.open()
    assert (second.result().finish, second.result().ids) == (FinishReason.ABORT, ())
    engine.submit(request([3], max_tokens=1), third)
    assert third.result().finish in (FinishReason.LENGTH, FinishReason.STOP)
    engine.abort(waiting.id)  # long gone
    engine.abort("nobody")
    first.result()


def test_aborts_at_any_moment_give_one_last_output(make: MakeEngine) -> None:
    engine = make(FakeRunner(num_pages=12, max_positions=40), max_num_seqs=4, max_num_batched_tokens=8)
    for seed in range(60):
        asked, sink = request([1, 2, seed % VOCAB], max_tokens=20, n=2, temperature=1.0, seed=seed), Sink(2)
        engine.submit(asked, sink)
        time.sleep(0.0002 * (seed % 7))
        engine.abort(asked.id)
        sink.result()
        whole = expected(asked, 40)[0]
        assert whole.ids[: len(sink.result().ids)] == sink.result().ids


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ([], {}, "the prompt is empty"),
        ([VOCAB], {}, "token id 48; the model has ids 0 to 47"),
        ([-1], {}, "token id -1"),
        (["a"], {}, "token id 'a'"),
        ([1] * 100, {}, "100 tokens; the model has 100 positions"),
        ([1] * 80, {}, "80 tokens; the cache holds 80"),
        ([1], {"stop_ids": [VOCAB]}, "stop_ids has the token id 48"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias has the token id 48"),
        ([1], {"allowed_ids": [1, VOCAB]}, "allowed_ids has the token id 48"),
        ([1], {"bad_ids": [[1], [VOCAB, 1]]}, "bad_ids has the token id 48"),
        ([1], {"stop": "x"}, "need a tokenizer"),
        ([1], {"grammar": Grammar("regex", "a")}, "need a tokenizer"),
    ],
)
def test_what_can_never_be_run_is_refused(
    make: MakeEngine, prompt: list[int], settings: dict[str, object], words: str
) -> None:
    engine = make(FakeRunner(num_pages=20))
    with pytest.raises(ConfigError, match=words):
        engine.submit(request(prompt, **settings), Sink())
    with pytest.raises(ConfigError, match=words):
        engine.generate([request([1]), request(prompt, **settings)])


def test_an_id_is_under_way_once(make: MakeEngine) -> None:
    runner = FakeRunner()
    gate = Gate(runner)
    engine, asked, sink = make(runner), request([1], max_tokens=2), Sink()
    engine.submit(asked, sink)
    with pytest.raises(ConfigError, match="is in use"):
        engine.submit(asked, Sink())
    gate.open()
    sink.result()
    wait_until(lambda: not engine._live)
    engine.submit(asked, again := Sink())
    again.result()


@pytest.mark.parametrize(
    "sizes", [{"max_num_batched_tokens": 0}, {"max_num_seqs": 0}, {"max_waiting": 0}, {"threads": 0}]
)
def test_sizes_that_cannot_work(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(sizes))} is 0; it must be at least 1"):
        EngineConfig(**sizes)  # type: ignore[arg-type]


def test_a_step_takes_two_tokens_of_each_sequence_at_least() -> None:
    assert EngineConfig(max_num_batched_tokens=7, max_num_seqs=4).step_tokens == 8
    assert EngineConfig(max_num_batched_tokens=9, max_num_seqs=4).step_tokens == 9


def test_an_unknown_knob() -> None:
    with pytest.raises(ConfigError, match=r"no setting 'max_sequences'; choose from engine, .*device, .*max_num_seqs"):
        EngineConfig(max_sequences=1)  # type: ignore[call-arg]


def test_close_without_draining_aborts(make: MakeEngine) -> None:
    runner = FakeRunner()
    gate = Gate(runner)
    engine, sinks = make(runner), [Sink(), Sink()]
    engine.submit(request([1], ignore_eos=True), sinks[0])
    assert gate.reached.wait(WAIT)
    engine.submit(request([2], ignore_eos=True), sinks[1])
    closer = threading.Thread(target=engine.close)
    closer.start()
    wait_until(lambda: engine._stop)
    gate.open()
    closer.join(WAIT)
    assert [sink.result().finish for sink in sinks] == [FinishReason.ABORT] * 2
    with pytest.raises(EngineClosed):
        engine.submit(request([1]), Sink())


def test_close_with_draining_lets_all_end(make: MakeEngine) -> None:
    engine, sinks = make(), [Sink() for _ in range(5)]
    asked = [request([i], max_tokens=20, ignore_eos=True) for i in range(1, 6)]
    for one, sink in zip(asked, sinks, strict=True):
        engine.submit(one, sink)
    engine.close(drain=True)
    engine.close()
    assert [len(sink.result().ids) for sink in sinks] == [20] * 5


def test_close_from_a_sink(make: MakeEngine) -> None:
    engine, seen = make(), queue.SimpleQueue[Output]()

    def sink(output: Output) -> None:
        seen.put(output)
        engine.close(drain=True)

    engine.submit(request([1], ignore_eos=True), sink)
    outputs = [seen.get(timeout=WAIT), seen.get(timeout=WAIT)]
    assert [output.finish for output in outputs] == [None, FinishReason.ABORT]


def test_a_mistake_of_our_own_leaves_nobody_waiting(make: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, sink = make(), Sink()

    def broken() -> None:
        raise KeyError("lost")

    monkeypatch.setattr(engine._loop.scheduler, "plan", broken)
    engine.submit(request([1]), sink)
    assert sink.result().finish == FinishReason.ERROR
    assert "lost" in str(sink.result().stop_reason)
    wait_until(lambda: engine._closed)
    with pytest.raises(EngineClosed):
        engine.submit(request([1]), Sink())


@pytest.mark.parametrize("where", ["sink", "runner"])
def test_nothing_that_is_raised_ends_the_worker(make: MakeEngine, where: str) -> None:
    """Cancellations and the panics of Rust's libraries are no Exceptions."""

    class Panic(BaseException):
        pass

    def broken(_: object) -> None:
        raise Panic("panicked")

    runner = FakeRunner()
    engine = make(runner)
    bad, good = Sink(), Sink()
    if where == "sink":
        engine.submit(request([3], max_tokens=3, ignore_eos=True), broken)
    else:
        runner.fail = broken
        engine.submit(request([3], max_tokens=3, ignore_eos=True), bad)
        assert (bad.result().finish, bad.result().stop_reason) == (FinishReason.ERROR, "panicked")
        runner.fail = lambda _: None
    engine.submit(request([4], max_tokens=3, ignore_eos=True), good)
    assert good.result().finish == FinishReason.LENGTH


def test_an_id_can_be_used_again_when_its_last_output_came(make: MakeEngine) -> None:
    engine = make(FakeRunner())
    asked = request([3], max_tokens=1)
    for _ in range(20):
        sink = Sink()
        engine.submit(asked, sink)
        sink.result()


def test_a_forked_child_is_told(make: MakeEngine) -> None:
    engine = make(FakeRunner())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of threads and fork
        child = os.fork()
    if child == 0:
        try:
            engine.submit(request([3]), print)
        except EngineClosed:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


class Letters(HostRunner):
    """A model of no sense over a real vocabulary."""

    vocab_size, max_positions, page_size, num_pages = 4100, 256, 16, 32
    cache_outputs = shares_prefixes = True
    max_sequences = None

    def run(self, batch: Sequence[Chunk]) -> list[NDArray[np.float32]]:
        rows = []
        for chunk in batch:
            generator = np.random.default_rng(sum(chunk.ids) + chunk.start)
            rows.append(generator.normal(0, 1, (chunk.logits, self.vocab_size)).astype(np.float32))
        return rows


@pytest.fixture
def letters() -> Iterator[Engine]:
    engine = Engine(Letters(), Tokenizer(demo_model()), eos_ids=[4])
    yield engine
    engine.close()


def test_structured_output(letters: Engine) -> None:
    grammar = Grammar("json_schema", json.dumps({"type": "array", "items": {"enum": ["a", 2]}, "maxItems": 4}))
    asked = [
        request([7, i], grammar=grammar, temperature=1.0, seed=i, max_tokens=60, min_tokens=i, stop_ids=[90])
        for i in range(8)
    ]
    together = collect(list(letters.generate(asked)))
    for one in asked:
        output = together[one.id, 0]
        assert collect(list(letters.generate([one]))) == {(one.id, 0): output}
        if output.stop_reason == 4:
            assert all(item in ("a", 2) for item in json.loads(output.text))
    assert any(output.stop_reason == 4 for output in together.values())


def test_a_wrong_grammar_is_refused_at_once(letters: Engine) -> None:
    with pytest.raises(ConfigError, match="the regex grammar is refused"):
        letters.submit(request([7], grammar=Grammar("regex", "[")), Sink())


def test_a_grammar_that_fails_on_the_way_ends_its_sequence_alone(letters: Engine) -> None:
    bad = request(
        [7], grammar=Grammar("lark", "start: /[xz]{20}/ y\ny: /a*/ y"), max_tokens=60, temperature=1.0, seed=1
    )
    good = request([8], grammar=Grammar("regex", "[a-z]{300}"), max_tokens=60, temperature=1.0, seed=1)
    outputs = collect(list(letters.generate([bad, good])))
    assert outputs[bad.id, 0].finish == FinishReason.ERROR
    assert "too much time" in str(outputs[bad.id, 0].stop_reason)
    assert outputs[good.id, 0].finish == FinishReason.LENGTH


def test_a_grammars_processes_go(letters: Engine) -> None:
    asked = request([7], grammar=Grammar("regex", "[a-z]{3}"), n=3, temperature=1.0, max_tokens=9)
    matcher = letters.check(asked)
    assert matcher is not None
    list(letters.generate([asked]))
    assert letters._compiler is not None
    vocabulary = letters._compiler._vocabulary
    assert vocabulary is not None
    running = [vocabulary.alive]
    del matcher
    letters.close()
    assert [*running, vocabulary.alive] == [True, False]
    with pytest.raises(EngineClosed):
        letters.check(asked)


def test_too_many_grammars(letters: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_LIVE", 1)
    asked = [request([7], grammar=Grammar("regex", f"{i}[a-z]{{9}}"), max_tokens=4) for i in range(3)]
    held = letters.check(asked[0])
    with pytest.raises(QueueFull, match="different grammars"):
        letters.submit(asked[1], Sink())
    with pytest.raises(QueueFull, match="different grammars"):
        list(letters.generate(asked[1:]))
    del held
    assert len(collect(list(letters.generate(asked[:1])))) == 1


def test_stop_strings_and_min_tokens(letters: Engine) -> None:
    whole = collect(list(letters.generate([request([7], max_tokens=30, ignore_eos=True)])))
    (free,) = whole.values()
    stop = free.text[20:24]
    cut = collect(list(letters.generate([request([7], max_tokens=30, ignore_eos=True, stop=stop)])))
    (output,) = cut.values()
    assert (output.text, output.stop_reason) == (free.text[: free.text.find(stop)], stop)
    assert output.ids == free.ids[: len(output.ids)]
    late = collect(list(letters.generate([request([7], max_tokens=30, min_tokens=30, ignore_eos=True, stop=stop)])))
    assert next(iter(late.values())).ids == free.ids


def test_stats(make: MakeEngine) -> None:
    engine = make()
    list(engine.generate([request([1] * 9, max_tokens=5, ignore_eos=True)]))
    list(engine.generate([request([1] * 9, max_tokens=5, ignore_eos=True)]))
    stats = engine.stats()
    assert (stats.tokens_generated, stats.prompt_tokens_computed) == (10, 9 + 1)
    assert (stats.prefix_hits, stats.prefix_queries) == (8, 18)
    assert (stats.running, stats.waiting, stats.pages_used, stats.pages) == (0, 0, 0, 64)
    assert stats.steps == 10
    assert 0 < stats.runner_seconds < stats.step_seconds
