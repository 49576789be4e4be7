"""Sums and gathers over processes of one host, in memory that they share (csrc/group.cpp).

The memory is a file without a name once all processes have opened it, so that none is left behind.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from squawq.backends.cpu.library import POINTER, SIZE, check, required
from squawq.errors import ConfigError, KernelError

CAPACITY = 1 << 18  # floats that are exchanged at a time
MEMORY = Path("/dev/shm")  # files that are never on a disk, where the system has them


class _Group(ctypes.Structure):  # csrc/group.h
    _fields_ = (
        *((name, SIZE) for name in ("rank", "size", "capacity")),
        *(("shared", POINTER), ("exchanges", SIZE), ("children", POINTER), ("count", SIZE)),
    )


def new_shared_memory(size: int, capacity: int = CAPACITY) -> int:
    """A descriptor of memory for the groups of so many processes. Raises ConfigError if there is no room for it."""
    folder = MEMORY if MEMORY.is_dir() else None
    try:
        with tempfile.TemporaryFile(dir=folder, prefix="squawq-") as file:
            count = required().squawq_group_bytes(size, capacity)
            os.ftruncate(file.fileno(), count)
            if hasattr(os, "posix_fallocate"):  # memory that is missing is an error now, not SIGBUS later
                os.posix_fallocate(file.fileno(), 0, count)
            return os.dup(file.fileno())
    except OSError as error:
        where = folder or tempfile.gettempdir()
        raise ConfigError(f"no memory to share with other processes in {where}: {error.strerror}") from error


class SharedGroup:
    """One rank's end. See `backends.base.Group`.

    Args:
        rank: This process's number, from 0 on.
        size: How many processes there are.
        descriptor: The file of `new_shared_memory`; it may be closed afterwards.
        capacity: As there.
    """

    def __init__(self, rank: int, size: int, descriptor: int, capacity: int = CAPACITY) -> None:
        self.rank, self.size = rank, size
        self._memory = mmap.mmap(descriptor, required().squawq_group_bytes(size, capacity))
        shared = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
        self._struct = _Group(rank, size, capacity, shared, 0, None, 0)
        self.pointer = ctypes.addressof(self._struct)

    def watch(self, processes: Sequence[int]) -> None:
        self._children = (ctypes.c_int64 * len(processes))(*processes)
        self._struct.children, self._struct.count = ctypes.addressof(self._children), len(processes)

    def all_reduce(self, x: Tensor) -> None:
        if x.dtype != torch.float32 or not x.is_contiguous():
            raise KernelError(f"no native sum of {x.dtype} {list(x.shape)}")
        check(required().squawq_all_reduce(self.pointer, x.data_ptr(), x.numel()))

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        if x.dtype != torch.float32 or x.shape[1:] != (widths[self.rank],):
            raise KernelError(f"{x.dtype} {list(x.shape)} is not {widths[self.rank]} columns of float32")
        x = x.contiguous()
        y = x.new_empty(len(x), sum(widths)) if self.rank == 0 else x
        columns = (ctypes.c_int64 * self.size)(*widths)
        check(required().squawq_gather(self.pointer, x.data_ptr(), len(x), ctypes.addressof(columns), y.data_ptr()))
        return y

    def end(self) -> None:
        """Make every rank that waits for another, now or later, raise RankError."""
        check(required().squawq_end_group(self.pointer))
