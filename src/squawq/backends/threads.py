"""Keeps torch on one thread while the kernels' threads compute, also from several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_inside: list[int] = []  # ids of threads in `one_thread`, one entry per nested call
_usual = 1  # torch's number of threads before


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch on one thread: its OpenMP threads would compete with the CPU kernels' threads.

    torch keeps the number per thread, and threads that start later inherit the one set last. So every thread that
    leaves restores the number that the first one found.
    """
    global _usual
    me = threading.get_ident()
    with _lock:
        if not _inside:
            _usual = torch.get_num_threads()
        outermost = me not in _inside
        _inside.append(me)
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _inside.remove(me)
            if outermost:
                torch.set_num_threads(_usual)
