"""torch's number of threads while fused models generate, in any number of threads at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_generating: list[int] = []  # threads that are in generate, once for each time
_usual = 1  # torch's threads outside of it


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread meanwhile: its threads wait for cores that the kernels' keep.

    The number is of each thread, and of those that start later the one set last: every thread that leaves sets what the
    first one found.
    """
    global _usual
    me = threading.get_ident()
    with _lock:
        if not _generating:
            _usual = torch.get_num_threads()
        outermost = me not in _generating
        _generating.append(me)
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _generating.remove(me)
            if outermost:
                torch.set_num_threads(_usual)
