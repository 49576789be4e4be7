"""Tensor parallelism: the processes that have the other parts of a model and run every step with this one.

This process is rank 0: it schedules and samples. It sends each step to the others as plain numbers over a socket, and
all of them exchange activations by their backend's group (`backends.base.Group`). A follower ends when rank 0 does,
however that ends; if a follower ends, all ranks that wait for it raise RankError.
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
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from squawq import errors
from squawq.backends.base import Batch, NextTokens
from squawq.engine.capacity import free_on
from squawq.errors import RankError
from squawq.nn.cache import Cache
from squawq.nn.decoder import Decoder
from squawq.nn.loader import OpenModel, Options, open_model
from squawq.nn.shard import Shard
from squawq.text.child import environment, read_exactly

GRACE_S = 5.0  # for a follower to end by itself
SIZE = struct.Struct("<Q")  # of a message
BEGIN = struct.Struct("<3Q")  # pages of the cache; rows and pages of `Decoder.follow_steps`, or 0
MESSAGES: tuple[type[Batch | NextTokens], ...] = Batch, NextTokens
SHAPE = struct.Struct("<2Q")  # of a field of a message: rows, and columns, or 0 where there are none
INT32 = ("pages", "tables")  # fields; others are int64
VARIABLES = ("CUDA_", "NCCL_", "TORCH_", "TRITON_", "NVIDIA_", "XDG_")  # of the environment, by how they begin
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
        free: Bytes of memory that are free for each follower, at least, once they have loaded.
    """

    def __init__(self, model: OpenModel, options: Options, threads: int) -> None:
        self.failure: str | None = None
        self.free = 0
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
                device = model.backend.rank_device(rank)
                chosen = {name: getattr(options, name) for name in TOLD} | {"device": device}
                told |= {"memory": memory, "options": chosen}
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

    def wait(self) -> int:
        """Wait until all have done what they were told, first to load. Raises the error of one that cannot.

        Returns:
            Bytes of memory that are free for each, at least.
        """
        free = []
        for rank, port in enumerate(self._ports, 1):
            try:
                answer = json.loads(_receive(port))
            except (OSError, EOFError) as cause:
                raise RankError(self._fate(rank)) from cause
            if not isinstance(answer, int):
                kind, message = answer
                raise getattr(errors, kind, RankError)(message)
            free.append(answer)
        return min(free)

    def begin(self, pages: int, rows: int = 0, each: int = 0) -> None:
        """Let all make a KV cache of so many pages. Raises the error of one that cannot.

        rows, each: Of `Decoder.follow_steps`, which all then call unless rows is 0, and `wait` waits for.
        """
        self._tell_all(BEGIN.pack(pages, rows, each))
        self.wait()
        if rows:
            self._tell_all(b"")

    def _tell_all(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # `wait` says how it has ended
            for port in self._ports:
                _send(port, message)

    def tell(self, step: Batch | NextTokens) -> None:
        """Let the followers run this step as well; to be called in `together`."""
        message = encode(step)
        for port in self._ports:
            _send(port, message)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Encloses what this rank does in a step. Raises RankError if a follower has ended, or an error ends all."""
        try:
            if self.failure is not None:
                raise RankError(self.failure)
            yield
            if self.failure is not None:  # while they ran
                raise RankError(self.failure)
        except BaseException as error:  # the others wait for this rank, so no step can follow
            gone = self._gone() if isinstance(error, OSError | RuntimeError | RankError) else None
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
        env=environment("SQUAWQ_ISA", "HOME", *(name for name in os.environ if name.startswith(VARIABLES))),
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


def encode(step: Batch | NextTokens) -> bytes:
    """A step as bytes: which of MESSAGES it is, and the shape and the numbers of each field."""
    parts = [bytes([MESSAGES.index(type(step))])]
    for field in fields(step):
        array = getattr(step, field.name).cpu().numpy()
        parts += SHAPE.pack(*array.shape, *[0] * (2 - array.ndim)), array.tobytes()
    return b"".join(parts)


def decode(message: bytes) -> Batch | NextTokens:
    """The step of `encode`, on the CPU."""
    kind, place, found = MESSAGES[message[0]], 1, {}
    for field in fields(kind):
        rows, columns = SHAPE.unpack_from(message, place)
        dtype = np.dtype(np.int32 if field.name in INT32 else np.int64)
        array = np.frombuffer(message, dtype, rows * (columns or 1), place + SHAPE.size).copy()
        found[field.name] = torch.from_numpy(array.reshape(rows, columns) if columns else array)
        place += SHAPE.size + array.nbytes
    return kind(**found)


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
        device, run_next = decoder.backend.device, None
        _done(port, device)
        pages, rows, each = BEGIN.unpack(_receive(port))
        cache = Cache(decoder.config, pages, decoder.backend)
        _done(port, device)
        if rows:
            _receive(port)
            run_next = decoder.follow_steps(cache, rows, each)
            _done(port, device)
        while True:
            step = decode(_receive(port))
            if isinstance(step, Batch):
                decoder(_on_device(step, device), cache)
            elif run_next is not None:
                run_next(step)
    except (EOFError, ConnectionError):  # rank 0 is gone
        return
    except Exception as error:
        with contextlib.suppress(OSError):
            _send(port, json.dumps([type(error).__name__, str(error)]).encode())


def _done(port: socket.socket, device: torch.device) -> None:
    _send(port, json.dumps(free_on(device)).encode())


def _on_device(batch: Batch, device: torch.device) -> Batch:
    moved = {field.name: getattr(batch, field.name).to(device) for field in fields(Batch) if field.name != "sequences"}
    return replace(batch, **moved)


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
