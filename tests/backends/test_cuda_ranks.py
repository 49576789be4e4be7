"""Tensor parallelism of the CUDA backend: on two GPUs, or by processes of Triton's interpreter."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import pytest
import torch
from conftest import MakeModel

pytest.importorskip("triton")

import interpreted_ranks

import squawq
from squawq import QuantConfig
from squawq.backends.cuda.backend import CudaBackend
from squawq.backends.sampling import Chunk
from squawq.engine.config import EngineConfig
from squawq.engine.engine import Engine
from squawq.engine.request import Output, Request, SamplingParams
from squawq.engine.runner import DecoderRunner, load_runner
from squawq.errors import ConfigError

GPUS = torch.cuda.device_count()
pytestmark = [
    *([pytest.mark.gpu] if GPUS else []),
    pytest.mark.skipif(GPUS == 1, reason="needs two GPUs, or none"),
    # in the interpreter itself
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
WAYS = ["peers"] if GPUS else ["peers", "group"]


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    squawq.quantize(make_model(), tmp_path / "out", QuantConfig(group_size=32, method="rtn"), progress=False)
    return tmp_path / "out"


def config(size: int) -> EngineConfig:
    device = "cuda" if GPUS else "cpu"
    return EngineConfig(device=device, tensor_parallel_size=size, kv_tokens=512, max_num_seqs=4, prefix_caching=False)


@contextmanager
def opened(folder: Path, size: int, way: str = "peers") -> Iterator[DecoderRunner]:
    """A model on so many ranks, which exchange by peers' memory or by the group."""
    with pytest.MonkeyPatch.context() as patch, nullcontext() if GPUS else interpreted_ranks.patches():
        if way == "group":
            patch.setenv(interpreted_ranks.BY_GROUP, "1")
        runner = load_runner(folder, config(size))
        try:
            yield runner
        finally:
            runner.close()


def asked(index: int, **sampling: float) -> Request:
    params = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=0, **sampling)  # type: ignore[arg-type]
    return Request(str(index), [(7 * index + 5 * place) % 150 + 2 for place in range(3 + 6 * index)], params)


def outputs(runner: DecoderRunner, requests: list[Request]) -> dict[str, list[tuple[int, float]]]:
    """Tokens and log probabilities of each request."""
    engine, found = Engine(runner, config=config(1)), dict[str, list[tuple[int, float]]]()
    try:
        for output in engine.generate(requests):
            found.setdefault(output.request, []).extend((item.token, item.logprob) for item in output.logprobs or ())
    finally:
        engine.close()
    return found


REQUESTS = [asked(0), asked(1), asked(2, temperature=0.8, seed=3)]


@pytest.mark.parametrize("way", WAYS)
def test_ranks_compute_what_one_process_does(folder: Path, way: str) -> None:
    """Prompts and next tokens, greedy and sampled; a token's log probability alike but for the order of sums."""
    chunk, found, logits = Chunk([5, 9, 77, 3, 150], 0, [3], 5), [], []
    for size in (1, 2):
        with opened(folder, size, way) as runner:
            logits.append(runner.run([chunk])[0])
            found.append(outputs(runner, REQUESTS))
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=5e-3 * float(np.abs(logits[0]).max()))
    for request in REQUESTS:
        one, two = found[0][request.id], found[1][request.id]
        assert [token for token, _ in one] == [token for token, _ in two]
        np.testing.assert_allclose([p for _, p in two], [p for _, p in one], atol=0.05)


def test_a_sequence_has_the_same_bits_beside_others(folder: Path) -> None:
    with opened(folder, 2) as runner:
        together = outputs(runner, REQUESTS)
        for request in REQUESTS:
            assert outputs(runner, [request]) == {request.id: together[request.id]}


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_is_killed_ends_all(folder: Path, way: str) -> None:
    with opened(folder, 2, way) as runner:
        assert runner._followers is not None
        engine, seen = Engine(runner, config=config(2)), list[Output]()
        request = Request("0", [5, 9, 77], SamplingParams(max_tokens=200, ignore_eos=True))
        try:
            for output in engine.generate([request]):
                seen.append(output)
                if len(seen) == 2:
                    os.kill(runner._followers._processes[0].pid, signal.SIGKILL)
        finally:
            engine.close()
        assert "process 1 of the 2 that run the model was killed by SIGKILL" in str(seen[-1].stop_reason)
        assert runner.failure is not None


@pytest.mark.skipif(GPUS > 0, reason="by processes of a CPU")
@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_and_gathers_of_a_group(size: int) -> None:
    """All ranks have the same sum, in the order of ranks; rank 0 has all columns; one that says so is heard by all."""
    program = """
import os, sys, torch
from squawq.backends.cuda.group import CudaGroup
rank, size, file = map(int, sys.argv[1:])
group = CudaGroup(rank, size, file, torch.device("cpu"))
parts = [torch.randn(3, 5, generator=torch.Generator().manual_seed(r)) for r in range(size)]
x = parts[rank].clone()
group.all_reduce(x)
assert torch.equal(x, sum(parts[1:], parts[0])), x
columns = group.gather(torch.full((2, 3 + rank), float(rank)), [3 + r for r in range(size)])
if rank == 0:
    assert columns[1].tolist() == [float(r) for r in range(size) for _ in range(3 + r)]
said = torch.full((2,), rank)
group.broadcast(said)
assert said.tolist() == [0, 0]
assert group.any(rank == size - 1)
assert not group.any(False)
group.barrier()
os._exit(0)  # gloo's threads may abort a process that tears itself down while another does
"""
    with TemporaryFile() as file:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", program, *map(str, (rank, size, file.fileno()))], pass_fds=[file.fileno()]
            )
            for rank in range(size)
        ]
        assert [process.wait(60) for process in ranks] == [0] * size


@pytest.mark.parametrize(("count", "why"), [(1, r"1 GPU is visible.*2 from cuda on"), (0, "0 GPUs are visible")])
def test_more_ranks_than_gpus_are_refused(count: int, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    reason = CudaBackend(torch.device("cuda")).group_declines(2)
    assert re.search(why, str(reason))


def test_a_cpu_of_this_backend_needs_no_gpus() -> None:
    assert CudaBackend(torch.device("cpu")).group_declines(4) is None
    with pytest.raises(ConfigError):
        EngineConfig(tensor_parallel_size=0)
