"""Tensor parallelism over processes of this machine: what they compute, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DECODED, MakeModel
from hypothesis import given
from hypothesis import strategies as st

import squawq
from squawq import LLM, QuantConfig
from squawq.backends.base import Batch, NextTokens
from squawq.backends.cpu import library
from squawq.backends.sampling import Chunk
from squawq.decoder_support import traits_of
from squawq.delta_config import DELTA_RULE
from squawq.demo import demo_model
from squawq.engine.config import EngineConfig
from squawq.engine.followers import Followers, decode, encode
from squawq.engine.runner import DecoderRunner, load_runner
from squawq.errors import CheckpointError, ConfigError, GenerationError, RankError
from squawq.families import FAMILIES
from squawq.nn.loader import Options, open_model
from squawq.nn.shard import Shard

pytestmark = pytest.mark.skipif(library.load() is None, reason="needs the native kernels")
PROMPTS = ["Once upon a time", "The little dog", "Tom and Lily went to the park and"]
PARENT = """
import sys
from squawq import LLM
from squawq.demo import demo_model
llm = LLM(demo_model(), tensor_parallel_size=2, threads=1)
print(*[process.pid for process in llm._model._runner._followers._processes], flush=True)
for _ in llm.stream("Once", max_tokens=4000, ignore_eos=True):
    pass
"""


@contextmanager
def opened(folder: Path, size: int) -> Iterator[DecoderRunner]:
    config = EngineConfig(device="cpu", threads=1, tensor_parallel_size=size, kv_tokens=1024, exact=True)
    runner = load_runner(folder, config)
    try:
        yield runner
    finally:
        runner.close()


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process ends within this time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def followers_of(runner: DecoderRunner) -> list[int]:
    assert runner._followers is not None
    return [process.pid for process in runner._followers._processes]


ROWS = [name for name in DECODED if traits_of(FAMILIES[name]).qk_norm != "whole" and name not in DELTA_RULE]


@pytest.mark.parametrize(("family", "size", "quantized"), [*((n, 2, True) for n in ROWS), ("qwen2", 4, False)])
def test_logits_are_those_of_one_process(
    family: str, size: int, quantized: bool, make_model: MakeModel, tmp_path: Path
) -> None:
    """Within what other sums change, in a KV cache of float16. Four ranks share two key-value heads."""
    folder = make_model(family, tie_word_embeddings=not quantized)
    if quantized:
        squawq.quantize(folder, tmp_path / "out", QuantConfig(group_size=32, method="rtn"), progress=False)
        folder = tmp_path / "out"
    batch = [Chunk([5, 9, 77, 3, 150], 0, [3], 5), Chunk([8, 4], 0, [1], 2)]
    found = []
    for ranks in (1, size):
        with opened(folder, ranks) as runner:
            found.append(runner.run(batch) + runner.run([Chunk([11], 5, [3], 1)]))
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-3 * float(np.abs(one).max()))


def test_greedy_text_is_that_of_one_process() -> None:
    texts = {}
    for size in (1, 2, 4):
        with LLM(demo_model(), device="cpu", threads=1, tensor_parallel_size=size) as llm:
            texts[size] = llm.generate(PROMPTS, max_tokens=48, temperature=0, progress=False)
    assert texts[2] == texts[1]
    assert texts[4] == texts[1]


def test_a_sequence_has_the_same_bits_in_any_batch(make_model: MakeModel) -> None:
    chunk, other = Chunk([5, 9, 77, 3, 150, 8], 0, [3], 6), Chunk(list(range(2, 40)), 0, [1, 5, 9], 1)
    with opened(make_model(), 2) as runner:
        (alone,) = runner.run([chunk])
        for batch in ([chunk, other], [other, chunk]):
            assert np.array_equal(runner.run(batch)[batch.index(chunk)], alone)
        assert np.array_equal(runner.run([Chunk(chunk.ids[:4], 0, [3], 4)])[0], alone[:4])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 2**31))
def test_steps_arrive_as_they_were_sent(sequences: list[int], seed: int) -> None:
    generator, rows = torch.Generator().manual_seed(seed), sum(sequences)

    def numbers(count: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(0, 2**31 - 1, (count,), generator=generator).to(dtype)

    batch = Batch(
        numbers(rows), numbers(rows), numbers(rows), numbers(4 * len(sequences)).view(-1, 4),
        numbers(3 * len(sequences), torch.int32), numbers(len(sequences) - 1),
    )  # fmt: skip
    tokens = NextTokens(numbers(4 * rows).view(4, rows), numbers(rows), numbers(5 * rows, torch.int32).view(rows, 5))
    no_tables = NextTokens(tokens.inputs, numbers(0), numbers(0, torch.int32))
    for step in (batch, tokens, no_tables):
        found = decode(encode(step))
        assert type(found) is type(step)
        for field in fields(step):
            one, other = getattr(step, field.name), getattr(found, field.name)
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def test_a_follower_that_is_killed_ends_all() -> None:
    llm = LLM(demo_model(), device="cpu", threads=1, tensor_parallel_size=2)
    assert isinstance(llm._model._runner, DecoderRunner)
    (pid,) = followers_of(llm._model._runner)
    pieces = llm.stream("Once", max_tokens=4000, ignore_eos=True)
    next(pieces)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(GenerationError, match=r"process 1 of the 2 that run the model was killed by SIGKILL"):
        list(pieces)
    assert not llm.engine.alive
    with pytest.raises(squawq.SquawqError):
        llm.generate("Once", max_tokens=3)
    llm.close()
    assert gone(pid)


def test_one_that_dies_while_nothing_runs(make_model: MakeModel) -> None:
    with opened(make_model(), 4) as runner:
        pids = followers_of(runner)
        os.kill(pids[1], signal.SIGKILL)
        end = time.monotonic() + 10
        while runner.failure is None and time.monotonic() < end:
            time.sleep(0.02)
        assert runner.failure is not None
        assert "process 2 of the 4" in runner.failure
        with pytest.raises(RankError, match="process 2 of the 4"):
            runner.run([Chunk([5], 0, [1], 1)])
    assert all(map(gone, pids))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_none_outlives_rank_0(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 1
        time.sleep(0.3)  # in the middle of a step, most likely
        parent.send_signal(number)
    assert all(map(gone, pids))


def test_an_error_of_a_follower_is_raised_here(make_model: MakeModel) -> None:
    folder, options = make_model(), Options(shard=Shard(0, 2))
    model = open_model(folder, options)
    (folder / "model.safetensors").unlink()
    followers = Followers(model, options, 1)
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors file"):
        followers.wait()
    assert followers.close()
    assert not followers.close()


def test_threads_are_as_before_once_it_is_closed(make_model: MakeModel) -> None:
    before = library.threads()
    library.set_threads(2)
    try:
        runner = load_runner(make_model(), EngineConfig(device="cpu", tensor_parallel_size=2, kv_tokens=64))
        assert library.threads() == max(1, library.default_threads() // 2)
        runner.close()
        assert library.threads() == 2
        runner = load_runner(make_model(name="other"), EngineConfig(device="cpu", tensor_parallel_size=2, threads=1))
        library.set_threads(3)  # by somebody else, meanwhile
        runner.close()
        assert library.threads() == 3
    finally:
        library.set_threads(before)


def test_loading_without_it_leaves_the_threads_alone(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        load_runner(make_model(), EngineConfig(device="cpu", kv_tokens=64))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_fork_leaves_the_followers_alone(make_model: MakeModel) -> None:
    with opened(make_model(), 2) as runner:
        child = os.fork()
        if not child:
            runner.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        runner.run([Chunk([5], 0, [1], 1)])
        assert runner.failure is None


def test_an_error_in_a_step_is_told(make_model: MakeModel) -> None:
    """The follower's own words are in the failure."""
    with opened(make_model(), 2) as runner:
        followers = runner._followers
        assert followers is not None
        followers._ports[0].sendall((3).to_bytes(8, "little") + b"\0no")  # no step
        end = time.monotonic() + 10
        while runner.failure is None and time.monotonic() < end:
            time.sleep(0.02)
        assert runner.failure is not None
        assert "process 1 of the 2 that run the model has ended: unpack_from requires" in runner.failure


def test_what_is_said_of_the_model_is_of_the_whole() -> None:
    with LLM(demo_model(), device="cpu", threads=1, tensor_parallel_size=2, kv_tokens=1024) as llm:
        shared = llm.config.num_heads, llm.config.intermediate_size, llm._model.cache_bytes
    with LLM(demo_model(), device="cpu", threads=1, kv_tokens=1024) as llm:
        assert shared == (llm.config.num_heads, llm.config.intermediate_size, llm._model.cache_bytes)


def test_what_cannot_be_is_refused_before_anything_is_loaded(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(ConfigError, match="tensor_parallel_size is 3, but its 4 attention heads"):
        load_runner(make_model(), EngineConfig(device="cpu", tensor_parallel_size=3))
    with pytest.raises(ConfigError, match="tensor_parallel_size is 0"):
        EngineConfig(tensor_parallel_size=0)
    monkeypatch.setattr(library, "load", lambda: None)
    with pytest.raises(
        ConfigError, match="tensor_parallel_size is 2, but the reference backend cannot share a model yet"
    ):
        load_runner(make_model(name="other"), EngineConfig(device="cpu", tensor_parallel_size=2))
