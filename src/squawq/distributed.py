"""The processes that share one calibration: torchrun's ranks, or one alone. The one door to torch.distributed.

All ranks go through the same steps. Work that may fail happens in `together` or `on_first`, exchanges outside of
them, so that an error on one rank ends all with that error and nobody waits for who has gone. Knows no model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

from torch import Tensor, distributed

from squawq.errors import CalibrationError, ConfigError, RankError, SquawqError

TIMEOUT = timedelta(hours=2)  # for a host that vanished without a word; the first rank's search may take long
T = TypeVar("T")


class Ranks:
    """One process alone: whatever ranks exchange, it has."""

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides, writes and speaks."""
        return self.rank == 0

    def device(self, device: str) -> str:
        """The device of this rank where `device` is the one asked for."""
        return device

    def share(self, blocks: int) -> slice:
        """Which of so many calibration blocks are this rank's. Raises CalibrationError where one would have none."""
        if blocks < self.size:
            raise CalibrationError(
                f"{self.size} processes cannot share {blocks} calibration blocks; give more samples, or start fewer"
            )
        return slice(blocks * self.rank // self.size, blocks * (self.rank + 1) // self.size)

    def together(self) -> AbstractContextManager[None]:
        """Work that every rank does, without exchanges; an error on one is raised on all."""
        return nullcontext()

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first rank, told to all; tensors in it have to be on the CPU."""
        return work()

    def opened(self, make: Callable[[], AbstractContextManager[T]]) -> AbstractContextManager[T]:
        """A context that every rank enters; an error in that on one is raised on all."""
        return make()

    def owned(self, make: Callable[[], AbstractContextManager[T]]) -> AbstractContextManager[T]:
        """A context of the first rank alone; what it gives is to be used within `on_first` and nowhere else."""
        return self.opened(make if self.first else lambda: nullcontext(cast(T, None)))

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raises ConfigError where another rank has other values."""

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors with their sums over the ranks."""


class TorchRanks(Ranks):
    """The ranks of an initialized torch.distributed."""

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def device(self, device: str) -> str:
        if device == "cuda":
            return f"cuda:{os.environ['LOCAL_RANK']}"
        if device != "cpu":
            raise ConfigError(
                f"device {device!r} cannot be shared by {self.size} processes; choose cpu, or cuda for a GPU each"
            )
        return device

    @contextmanager
    def together(self) -> Iterator[None]:
        own: BaseException | None = None
        try:
            yield
        except BaseException as error:  # also what stops a run: all stop
            own = error
        failures = self._gather(None if own is None else _portable(self.rank, own))
        for rank, failure in enumerate(failures):
            if own is not None and rank == self.rank:
                raise own
            if failure is not None:
                kind, *arguments = failure
                raise kind(*arguments)

    def on_first(self, work: Callable[[], T]) -> T:
        found: list[Any] = [None]
        with self.together():
            if self.first:
                found[0] = work()
        with _answered():
            distributed.broadcast_object_list(found, src=0)
        return cast(T, found[0])

    @contextmanager
    def opened(self, make: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
        with ExitStack() as stack:
            with self.together():
                thing = stack.enter_context(make())
            yield thing

    def check_same(self, values: Mapping[str, Any]) -> None:
        first, *others = self._gather(dict(values))
        for rank, other in enumerate(others, 1):
            if differing := ", ".join(sorted(key for key in first if first[key] != other.get(key))):
                raise ConfigError(
                    f"process {rank} has another {differing} than process 0; every host needs the same "
                    "model, calibration, settings and squawq"
                )

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        with _answered():
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def _gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with _answered():
            distributed.all_gather_object(found, value)
        return found


def _portable(rank: int, error: BaseException) -> tuple[Any, ...]:
    """What the other ranks raise: a class and its arguments."""
    if isinstance(error, SquawqError) or not isinstance(error, Exception):
        return type(error), *error.args
    return RankError, f"process {rank} failed: {type(error).__name__}: {error}"


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed's kinds are all of this one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise RankError(
            f"another process of this run has ended or does not answer; its own message says why ({reason})"
        ) from error


@contextmanager
def torchrun_ranks(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun has started this process among, while the context is open; else this process alone."""
    if not distributed.is_available() or not distributed.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield Ranks()
        return
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") and distributed.is_nccl_available() else "gloo"
    distributed.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield TorchRanks()
    finally:
        distributed.destroy_process_group()
