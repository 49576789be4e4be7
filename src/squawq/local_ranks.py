"""The ranks of `squawq quantize` on one host, without torchrun: how many there are, and their processes.

The command's own process is rank 0, so its signals, output and exit code are those of a single process. It starts the
others and ends them. If it is killed they end by themselves.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

import torch

from squawq.backends.devices import check_device
from squawq.distributed import Ranks, host_ranks, torchrun_size
from squawq.errors import ConfigError, RankError, SquawqError
from squawq.progress import console

GRACE_S = 10  # for processes to end by themselves
USUAL = (SquawqError, OSError, MemoryError, RuntimeError)  # an error of these classes is one line, here too
SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOOPBACK = {"linux": "lo", "darwin": "lo0"}


def rank_count(devices: int | None, device: str, stream: bool, blocks: Callable[[], int | None]) -> int:
    """How many ranks to start.

    Args:
        devices: What the user chose; None: one for each visible GPU if the device is "cuda", else 1.
        device: See `quantize`.
        stream: See `quantize`.
        blocks: Counts calibration blocks, None for none; by default no rank is without one.

    Returns:
        1 under torchrun, which has started all.

    Raises:
        ConfigError: That many cannot be started.
    """
    running, gpus = torchrun_size(), torch.cuda.device_count()
    if running is not None:
        if devices not in (None, running):
            raise ConfigError(f"devices is {devices}, but torchrun started {running} processes; leave devices out")
        return 1
    if devices is None:
        return 1 if device != "cuda" or stream or gpus < 2 else min(gpus, blocks() or 1)
    check_device(device, mps=True)
    if device == "cuda" and not 1 <= devices <= gpus:
        raise ConfigError(f"devices is {devices}, but {gpus} GPUs are visible; choose 1 to {gpus}")
    if devices < 1:
        raise ConfigError(f"devices is {devices}; choose 1 or more")
    if devices > 1 and device not in ("cpu", "cuda"):
        raise ConfigError(f"devices is {devices}, but device {device!r} is a single one; choose cuda, cpu, or 1 device")
    if devices > 1 and stream:
        raise ConfigError(f"devices is {devices}, but stream works with one; choose 1, or leave stream out")
    return devices


@contextmanager
def local_ranks(size: int, device: str, work: Callable[..., object]) -> Iterator[Ranks]:
    """This process as rank 0 of `size`, while the context is open.

    Args:
        size: How many ranks.
        device: See `quantize`.
        work: Called as `work(ranks=...)` in the other processes; pickle must be able to send it.

    Raises:
        RankError: Another process was killed.
    """
    if sys.platform in LOOPBACK:  # gloo would listen on the network
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    spawn = multiprocessing.get_context("spawn")
    with TemporaryDirectory(prefix="squawq-ranks-") as folder:
        place, threads = (device, size, Path(folder, "meeting")), torch.get_num_threads()
        others = {rank: spawn.Process(target=_run, args=(rank, place, threads, work)) for rank in range(1, size)}
        with _running(others), host_ranks(device, 0, size, place[2]) as ranks:
            yield ranks


@contextmanager
def _running(others: Mapping[int, SpawnProcess]) -> Iterator[None]:
    """Other ranks' processes, while the context is open."""
    started: dict[int, SpawnProcess] = {}
    ending = Event()
    try:
        with _ignored_signals():  # by them, from their first moment on: a terminal sends its signals to them as well
            for rank, other in others.items():
                other.start()
                started[rank] = other
        Thread(target=_watch, args=(started, ending), daemon=True).start()
        yield
    except RankError as error:
        ending.set()
        _join(started.values())
        if (fate := _fate(started)) is not None:
            raise RankError(fate) from error
        raise
    finally:
        ending.set()
        try:
            _join(started.values())
        finally:
            for other in started.values():
                other.kill()
                other.join()


@contextmanager
def _ignored_signals() -> Iterator[None]:
    before = [signal.signal(number, signal.SIG_IGN) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def _join(processes: Iterable[SpawnProcess]) -> None:
    end = time.monotonic() + GRACE_S
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))


def _fate(others: Mapping[int, SpawnProcess]) -> str | None:
    """Which of the processes was killed, and how."""
    for rank, other in others.items():
        if (code := other.exitcode or 0) < 0:
            return (
                f"process {rank} of {len(others) + 1} was killed by {signal.Signals(-code).name}; "
                "if memory ran out, choose fewer devices"
            )
    return None


def _watch(others: Mapping[int, SpawnProcess], ending: Event) -> None:
    """End this process if another one failed and this one, which may wait for it on a GPU, does not notice."""
    waiting: dict[object, SpawnProcess] = {other.sentinel: other for other in others.values()}
    while waiting:
        for sentinel in wait([other.sentinel for other in waiting.values()]):
            if waiting.pop(sentinel).exitcode != 0 and not ending.wait(GRACE_S):
                console.show_cursor()
                fate = _fate(others) or "another process has failed; its own message says why"
                print(f"squawq: error: {fate}", file=sys.stderr, flush=True)
                os._exit(2)


def _run(rank: int, place: tuple[str, int, Path], threads: int, work: Callable[..., object]) -> None:
    """What another rank's process does."""
    faulthandler.enable()
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    device, size, meeting = place
    with host_ranks(device, rank, size, meeting) as ranks:
        try:
            work(ranks=ranks)
        except BaseException as error:  # rank 0 was told, and says it
            if isinstance(error, Exception) and not isinstance(error, USUAL):
                traceback.print_exc()
            sys.exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
