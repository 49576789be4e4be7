"""Tensor parallelism over GPUs of one host: the sums and gathers of prompts, by NCCL (`peers.py`: of decode steps).

NVLink multicast (NVLS) stays off: its sums have no fixed order.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from threading import Thread
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from squawq.errors import KernelError

C10D: Any = torch.distributed  # its stubs lack most of what this module uses
TIMEOUT = timedelta(seconds=60)  # for all ranks to arrive where they exchange addresses
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # else a rank that has ended takes the whole process with it
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}


class CudaGroup:
    """One rank's end. See `backends.base.Group`; without a GPU, in tests, by gloo.

    Args:
        memory: Descriptor of an empty file, in which the ranks find each other; it may be closed afterwards.

    Attributes:
        store: Where the ranks find each other.
        ended: int32 [1] in the host's memory: 1 when nothing is to be waited for any more.
        seen_ended: int32 [1] in the GPU's memory: 1 when a kernel has read that.
    """

    def __init__(self, rank: int, size: int, memory: int, device: torch.device) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(device)
        self.rank, self.size, self.device = rank, size, device
        self._over, self._count = False, 0
        file = os.dup(memory)
        weakref.finalize(self, os.close, file)  # until then the store opens it by its path, again and again
        self.store: Any = C10D.FileStore(f"/proc/self/fd/{file}", size)
        self.store.set_timeout(TIMEOUT)
        self.ended = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.seen_ended = torch.zeros(1, dtype=torch.int32, device=device)

    @cached_property
    def _group(self) -> Any:
        """Where all ranks must arrive, so not before they all run."""
        if self.device.type == "cuda":
            return C10D.ProcessGroupNCCL(self.store, self.rank, self.size)
        return C10D.ProcessGroupGloo(self.store, self.rank, self.size, TIMEOUT)

    def all_reduce(self, x: Tensor) -> None:
        """By the ranks' parts, each added up on one rank in the order of ranks: NCCL's own order depends on the place.

        Two numbers have the same sum in any order.
        """
        if self.size == 2:
            self._group.allreduce([x]).wait()
            return
        count = -(-x.numel() // self.size)
        padded = F.pad(x.reshape(-1), (0, count * self.size - x.numel()))
        parts = torch.empty_like(padded)
        self._group.alltoall_base(parts, padded, [], []).wait()
        first, *others = parts.view(self.size, count)
        total = first.float()
        for other in others:
            total += other
        self._group._allgather_base(parts, total.to(x.dtype)).wait()
        x.copy_(parts[: x.numel()].view(x.shape))

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        if x.shape[1:] != (widths[self.rank],):
            raise KernelError(f"{list(x.shape)} is not {widths[self.rank]} columns")
        padded = F.pad(x, (0, max(widths) - x.shape[1]))
        parts = padded.new_empty(self.size * len(x), padded.shape[1])
        self._group._allgather_base(parts, padded).wait()
        if self.rank:
            return x
        each = zip(parts.view(self.size, *padded.shape), widths, strict=True)
        return torch.cat([part[:, :width] for part, width in each], 1)

    def broadcast(self, x: Tensor) -> None:
        """Rank 0's x, on all ranks."""
        self._group.broadcast(x, 0).wait()

    def barrier(self) -> None:
        """Wait until all ranks are here, and their GPUs have done what they were given."""
        self.any(False)

    def count(self) -> int:
        """How often this was called, the same on all ranks."""
        self._count += 1
        return self._count

    def any(self, here: bool) -> bool:
        """Whether this is so on any rank."""
        x = torch.full((1,), float(here), device=self.device)
        self.all_reduce(x)
        return x.item() > 0

    @contextmanager
    def unawaited(self) -> Iterator[None]:
        """Nothing is waited for while this is open; at its end all ranks are here."""
        self.ended.fill_(1)
        yield
        self.barrier()
        self.ended.fill_(int(self._over))
        self.seen_ended.zero_()

    def watch(self, processes: Sequence[int]) -> None:
        """Nothing: a rank that has ended is noticed by rank 0, which calls `end`."""

    def end(self) -> None:
        self._over = True
        self.ended.fill_(1)
        if "_group" in self.__dict__:  # in a thread: it waits for graphs that hold it
            Thread(target=self._group.abort, daemon=True).start()
