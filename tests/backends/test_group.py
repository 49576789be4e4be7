"""Sums and gathers over processes, in pieces smaller than what is exchanged, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from squawq.backends.cpu import library
from squawq.backends.cpu.group import SharedGroup, new_shared_memory
from squawq.errors import KernelError

pytestmark = pytest.mark.skipif(library.load() is None, reason="needs the native kernels")
WORKER = Path(__file__).with_name("group_worker.py")
SIZE, CAPACITY = 3, 64


def test_sums_and_gathers() -> None:
    memory = new_shared_memory(SIZE, CAPACITY)
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), *map(str, (rank, SIZE, memory, CAPACITY))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[memory],
        )
        for rank in range(SIZE)
    ]  # fmt: skip
    try:
        found = []
        for worker in workers:
            assert worker.stdout is not None
            found.append(json.loads(worker.stdout.readline()))
        widths = [3, 200, 1]
        parts = [torch.arange(5.0 * width).view(5, width) + 1000 * rank for rank, width in enumerate(widths)]
        for number, count in enumerate([1, 64, 65, 1000, 7]):
            values = [
                torch.randn(count, generator=torch.Generator().manual_seed(100 * number + rank)) for rank in range(SIZE)
            ]
            wanted = (values[0] + values[1]) + values[2]  # in this order, to the bit
            assert all(torch.equal(torch.tensor(own[2 * number]), wanted) for own in found)
            assert torch.equal(torch.tensor(found[0][2 * number + 1]), torch.cat(parts, 1))
        group = SharedGroup(0, SIZE, memory, CAPACITY)
        for worker in workers[1:]:  # these wait for rank 0, which comes no more
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
        group.end()
        for worker in workers[1:]:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ended\n"
    finally:
        os.close(memory)
        for worker in workers:
            worker.kill()
            worker.communicate()


def test_what_it_does_not_take() -> None:
    memory = new_shared_memory(1)
    group = SharedGroup(0, 1, memory)
    os.close(memory)
    x = torch.ones(4)
    group.all_reduce(x)
    assert torch.equal(x, torch.ones(4))
    with pytest.raises(KernelError, match=r"no native sum of torch\.float16"):
        group.all_reduce(torch.ones(4, dtype=torch.float16))
    with pytest.raises(KernelError, match="is not 3 columns"):
        group.gather(torch.ones(2, 4), [3])
