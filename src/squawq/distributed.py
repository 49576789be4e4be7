"""The ranks that share one calibration: torchrun's processes, processes of one host (`local_ranks`), or one process.

All ranks run the same program and wait for each other in `all_reduce`, `broadcast` and `check_same`. An exception on
one rank is raised on all others in their next such call, so that none waits for a rank that has ended.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, distributed

from squawq.errors import CalibrationError, ConfigError, RankError, SquawqError

TIMEOUT = timedelta(hours=2)  # for a host that failed silently; long, because the others wait while rank 0 searches
T = TypeVar("T")


class Ranks:
    """A single process: the collectives do nothing.

    Attributes:
        stops_at_once: Whether a second signal may stop it in the middle of a layer: none but the user sends it signals.
    """

    rank, size, stops_at_once = 0, 1, True

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which searches, writes and reports."""
        return self.rank == 0

    def device(self, device: str) -> str:
        """This rank's device if the user chose `device`. Raises ConfigError if ranks cannot share it."""
        return device

    def share(self, blocks: int) -> slice:
        """This rank's calibration blocks. Raises CalibrationError if a rank would have none."""
        if blocks < self.size:
            raise CalibrationError(
                f"{self.size} processes cannot share {blocks} calibration blocks; give more samples, or start fewer"
            )
        return slice(blocks * self.rank // self.size, blocks * (self.rank + 1) // self.size)

    def session(self) -> AbstractContextManager[None]:
        """Encloses all work that the ranks do together; an exception inside it on one rank is raised on all."""
        return nullcontext()

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raise ConfigError, on all ranks, if the values differ between ranks."""

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors, of the same shapes on all ranks, with their sums over all ranks, in place."""

    def broadcast(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its result on all ranks; tensors in it must be on the CPU."""
        return work()

    def on_first(self, make: Callable[[], AbstractContextManager[T]]) -> AbstractContextManager[T]:
        """Open a context on rank 0 alone; its value may only be used in `broadcast`."""
        return make() if self.first else nullcontext(cast(T, None))


class TorchRanks(Ranks):
    """The ranks of an initialized torch.distributed.

    Args:
        local: The rank among those on this host.
        stops_at_once: See `Ranks`.
    """

    def __init__(self, local: int, stops_at_once: bool = False) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.stops_at_once, self._local = stops_at_once, local
        self._over = False  # all ranks know that the session has failed

    def device(self, device: str) -> str:
        if device == "cuda":
            return f"cuda:{self._local}"
        if device != "cpu":
            raise ConfigError(
                f"device {device!r} cannot be shared by {self.size} processes; choose cpu, or cuda for a GPU each"
            )
        return device

    @contextmanager
    def session(self) -> Iterator[None]:
        self._over = False
        try:
            yield
            self._meet()
        except BaseException as error:  # also KeyboardInterrupt: all ranks stop
            if not self._over:
                self._gather(_portable(self.rank, error))
            raise

    def check_same(self, values: Mapping[str, Any]) -> None:
        self._meet()
        first, *others = self._gather(dict(values))
        for rank, other in enumerate(others, 1):
            if differing := ", ".join(sorted(key for key in first if first[key] != other.get(key))):
                self._over = True
                raise ConfigError(
                    f"process {rank} has another {differing} than process 0; every host needs the same "
                    "model, calibration, settings and squawq"
                )

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        self._meet()
        with self._raising_rank_error():
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def broadcast(self, work: Callable[[], T]) -> T:
        self._meet()
        found: list[Any] = [work() if self.first else None]
        self._meet()
        with self._raising_rank_error():
            distributed.broadcast_object_list(found, src=0)
        return cast(T, found[0])

    def _meet(self) -> None:
        """Wait for all ranks, and raise the exception of the first one that failed."""
        if failure := next((found for found in self._gather(None) if found is not None), None):
            self._over = True
            kind, *arguments = failure
            raise kind(*arguments)

    def _gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with self._raising_rank_error():
            distributed.all_gather_object(found, value)
        return found

    @contextmanager
    def _raising_rank_error(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # the base class of all errors of torch.distributed
            self._over = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise RankError(
                f"another process of this run has ended or does not answer; its own message says why ({reason})"
            ) from error
        except BaseException:  # such as KeyboardInterrupt: others are in this exchange, and would mistake a second one
            self._over = True
            raise


def _portable(rank: int, error: BaseException) -> tuple[Any, ...]:
    """What the other ranks raise: a class and its arguments, which pickle can send."""
    if isinstance(error, SquawqError) or not isinstance(error, Exception):
        return type(error), *error.args
    return RankError, f"process {rank} failed: {type(error).__name__}: {error}"


def torchrun_size() -> int | None:
    """How many processes torchrun started; None without it."""
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        return None
    return int(os.environ["WORLD_SIZE"])


@contextmanager
def torchrun_ranks(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started, while the context is open; without torchrun, this process alone."""
    if torchrun_size() in (None, 1):
        yield Ranks()
        return
    with _process_group(device):
        yield TorchRanks(int(os.environ["LOCAL_RANK"]))


@contextmanager
def host_ranks(device: str, rank: int, size: int, meeting: Path) -> Iterator[Ranks]:
    """This process as one of `size` on this host, while the context is open; they find each other by a new file."""
    store = distributed.FileStore(str(meeting), size)  # type: ignore[attr-defined]
    with _process_group(device, store=store, rank=rank, world_size=size):
        yield TorchRanks(rank, stops_at_once=True)


@contextmanager
def _process_group(device: str, **members: Any) -> Iterator[None]:
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") and distributed.is_nccl_available() else "gloo"
    distributed.init_process_group(backend, timeout=TIMEOUT, **members)
    try:
        yield
    finally:
        distributed.destroy_process_group()
