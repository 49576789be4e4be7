"""The CUDA backend's ranks without GPUs: kernels in Triton's interpreter, and memory that processes share.

`patches` makes a process such a rank; run as a program, it is one that follows another.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

from squawq import backends
from squawq.backends.cuda import peers
from squawq.backends.cuda.backend import CudaBackend
from squawq.backends.cuda.group import CudaGroup
from squawq.engine import followers
from squawq.text.child import environment

BY_GROUP = "SQUAWQ_TEST_BY_GROUP"  # set: as on GPUs that cannot reach each other's memory


def open_peers(group: CudaGroup, numbers: int, counters: int) -> peers.Peers:
    if BY_GROUP in os.environ:
        raise RuntimeError("not reached")
    each = 4 * (numbers + counters)
    if group.rank == 0:
        descriptor, path = tempfile.mkstemp()
        os.truncate(descriptor, each * group.size)
        group.store.set("peers", path)
    else:
        path = group.store.get("peers").decode()
        descriptor = os.open(path, os.O_RDWR)
    memory = torch.frombuffer(mmap.mmap(descriptor, each * group.size), dtype=torch.float32)
    os.close(descriptor)
    group.barrier()
    if group.rank == 0:
        Path(path).unlink()
    own = memory[each // 4 * group.rank :][: each // 4]
    buffers = memory.data_ptr() + each * torch.arange(group.size)
    return peers.Peers((buffers, buffers + 4 * numbers), own[:numbers], own[numbers:].view(torch.int32), memory)


def start(port: int, memory: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, __file__, str(port), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment("TRITON_INTERPRET", "OMP_NUM_THREADS", BY_GROUP),
        pass_fds=(port, memory),
    )


def patches() -> ExitStack:
    stack = ExitStack()
    stack.enter_context(patch.object(CudaBackend, "declines", classmethod(lambda cls, device: None)))
    stack.enter_context(patch.dict(backends.BACKENDS, {"cpu": backends.BACKENDS["cuda"]}))
    stack.enter_context(patch.object(peers, "open_peers", open_peers))
    stack.enter_context(patch.object(followers, "_start", start))
    return stack


if __name__ == "__main__":
    with patches():
        followers.main()
