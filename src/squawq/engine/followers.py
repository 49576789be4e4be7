"""Tensor parallelism: the processes that have the other parts of a model and run every step with this one.

This process is rank 0: it schedules and samples. It sends each step to the others as plain numbers over a socket, and
all of them exchange activations through shared memory (`backends.cpu.group`). A follower ends when rank 0 does, however
that ends; if a follower ends, all ranks that wait for it raise RankError.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from squawq import errors
from squawq.backends.base import Batch
from squawq.errors import RankError
from squawq.nn.cache import Cache
from squawq.nn.decoder import Decoder
from squawq.nn.loader import OpenModel, Options, open_model
from squawq.nn.shard import Shard
from squawq.text.child import environment, read_exactly

GRACE_S = 5.0  # for a follower to end by itself
SIZE = struct.Struct("<Q")  # of a message
FIELDS = fields(Batch)
HEAD = struct.Struct(f"<{len(FIELDS)}Q")  # elements of each field
TOLD = ("device", "exact", "head", "backend", "dtype", "kv_cache_dtype")  # fields of Options


class Followers:
    """Ranks 1 to size - 1, which load their parts of a model meanwhile.

    Args:
        model: Rank 0's part, not yet loaded; its backend joins the group.
        options: How it was opened.
        threads: Of each follower.

    Attributes:
        failure: Why there is no more step; None while all is well.
        size: How many ranks there are.
        config: Of the whole model.
    """

    def __init__(self, model: OpenModel, options: Options, threads: int) -> None:
        self.failure: str | None = None
        self.size, self.config = model.shard.size, model.checkpoint.config
        size = self.size
        self._lock = threading.Lock()
        memory = model.backend.group_memory(size)
        processes: list[subprocess.Popen[bytes]] = []
        ports: list[socket.socket] = []
        try:
            group = model.backend.join(0, size, memory)
            for rank in range(1, size):
                near, far = socket.socketpair()
                ports.append(near)
                with far:
                    processes.append(_start(far.fileno(), memory))
                told = {"folder": str(model.checkpoint.folder), "rank": rank, "size": size, "threads": threads}
                told |= {"memory": memory, "options": {name: getattr(options, name) for name in TOLD}}
                _send(near, json.dumps(told).encode())
        except BaseException:
            _end(processes, ports, os.getpid())
            raise
        finally:
            os.close(memory)
        self._processes, self._ports, self._group = processes, ports, group
        self._owner = os.getpid()
        self._end = weakref.finalize(self, _end, processes, ports, self._owner)
        group.watch([process.pid for process in processes])
        watched = weakref.ref(self)
        for rank, process in enumerate(processes, 1):
            threading.Thread(target=_watch, args=(watched, rank, process), daemon=True).start()

    def close(self) -> bool:
        """End the followers; whether they were still there."""
        there = self._end.alive
        self._end()
        return there

    def wait(self) -> None:
        """Wait until all have loaded, or made their caches. Raises the error of one that cannot."""
        for rank, port in enumerate(self._ports, 1):
            try:
                error = json.loads(_receive(port))
            except (OSError, EOFError) as cause:
                raise RankError(self._fate(rank)) from cause
            if error is not None:
                kind, message = error
                raise getattr(errors, kind, RankError)(message)

    def begin(self, pages: int) -> None:
        """Let all make a KV cache of so many pages. Raises the error of one that cannot."""
        with contextlib.suppress(OSError):  # `wait` says how it has ended
            for port in self._ports:
                _send(port, SIZE.pack(pages))
        self.wait()

    @contextlib.contextmanager
    def step(self, batch: Batch) -> Iterator[None]:
        """The followers run this step as well, while the context is open. Raises RankError if one has ended."""
        try:
            if self.failure is not None:
                raise RankError(self.failure)
            message = encode(batch)
            for port in self._ports:
                _send(port, message)
            yield
        except BaseException as error:  # the others wait for this rank, so no step can follow
            gone = self._gone() if isinstance(error, OSError | RankError) else None
            self._fail(gone or str(error) or type(error).__name__)
            raise RankError(self.failure) from error

    def _fail(self, why: str) -> None:
        if os.getpid() != self._owner:  # a fork's copy: its followers are the parent's
            return
        with self._lock:
            self.failure = self.failure or why
        self._group.end()

    def _gone(self) -> str | None:
        """How the first follower ended that has; waits a little for one to do so."""
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end:
            for rank, process in enumerate(self._processes, 1):
                if process.poll() is not None:
                    return self._fate(rank)
            time.sleep(0.01)
        return None

    def _fate(self, rank: int) -> str:
        """How a follower ended."""
        process = self._processes[rank - 1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        code = process.returncode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "has ended"
        how += "; perhaps memory ran out" if code == -signal.SIGKILL else ""
        port = self._ports[rank - 1]
        with contextlib.suppress(OSError, EOFError, ValueError, TypeError):  # else it has said nothing
            port.settimeout(GRACE_S)
            how += f": {json.loads(_receive(port))[1]}"
        return f"process {rank} of the {self.size} that run the model {how}"


def _start(port: int, memory: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "squawq.engine.followers", str(port), str(os.getpid())],
        stdin=subprocess.PIPE,  # never written to: it closes when this process ends
        stdout=subprocess.DEVNULL,
        env=environment("SQUAWQ_ISA", "HOME"),
        pass_fds=(port, memory),
        start_new_session=True,  # Ctrl-C is for rank 0
    )


def _watch(followers: weakref.ref[Followers], rank: int, process: subprocess.Popen[bytes]) -> None:
    process.wait()
    if (owner := followers()) is not None and owner._end.alive:
        owner._fail(owner._fate(rank))


def _end(processes: list[subprocess.Popen[bytes]], ports: list[socket.socket], owner: int) -> None:
    for port in ports:
        port.close()
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    if os.getpid() != owner:
        return
    end = time.monotonic() + GRACE_S
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        process.kill()
        process.wait()


def _send(port: socket.socket, message: bytes) -> None:
    port.sendall(SIZE.pack(len(message)) + message)


def _receive(port: socket.socket) -> bytes:
    """Raises EOFError when the other end is gone."""
    return read_exactly(port, SIZE.unpack(read_exactly(port, SIZE.size))[0])


def encode(batch: Batch) -> bytes:
    """A step as bytes: how many elements each field has, and the fields one after another."""
    arrays = [getattr(batch, field.name).cpu().numpy() for field in FIELDS]
    return HEAD.pack(*(array.size for array in arrays)) + b"".join(array.tobytes() for array in arrays)


def decode(message: bytes, device: torch.device) -> Batch:
    """The step of `encode`."""
    counts, place, found = HEAD.unpack_from(message), HEAD.size, {}
    for field, count in zip(FIELDS, counts, strict=True):
        dtype = np.dtype(np.int32 if field.name == "pages" else np.int64)
        tensor = torch.from_numpy(np.frombuffer(message, dtype, count, place).copy())
        found[field.name] = tensor.view(-1, 4) if field.name == "sequences" else tensor.to(device)
        place += count * dtype.itemsize
    return Batch(**found)


def _load(told: Mapping[str, Any]) -> Decoder:
    shard = Shard(told["rank"], told["size"])
    model = open_model(told["folder"], Options(**told["options"], shard=shard))
    model.backend.set_threads(told["threads"])
    model.backend.join(shard.rank, shard.size, told["memory"])
    os.close(told["memory"])
    return model.load()


def _follow(port: socket.socket) -> None:
    """A follower's life: load, then run steps until rank 0 closes the socket, or an error, of which it sends a line."""
    told = json.loads(_receive(port))
    try:
        decoder = _load(told)
        _send(port, b"null")
        (pages,) = SIZE.unpack(_receive(port))
        cache = Cache(decoder.config, pages, decoder.backend)
        _send(port, b"null")
        while True:
            decoder(decode(_receive(port), decoder.backend.device), cache)
    except (EOFError, ConnectionError):  # rank 0 is gone
        return
    except Exception as error:
        with contextlib.suppress(OSError):
            _send(port, json.dumps([type(error).__name__, str(error)]).encode())


def _end_with(parent: int) -> None:
    """End this process when rank 0 has ended: then its end of stdin is closed, unless a fork of it has a copy."""
    while not select.select([0], [], [], 1.0)[0] and os.getppid() == parent:
        pass
    os._exit(1)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    torch.set_num_threads(1)
    _follow(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
