"""What the ranks of a decode step exchange: sums of partial products, sampled tokens, logits.

`PeerExchange` writes into the memory of the other GPUs, which takes some microseconds; `GroupExchange` asks the group
(NCCL), where the GPUs cannot reach each other's memory. Both can be captured in a CUDA graph.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from squawq.backends.base import Vocabulary
from squawq.backends.cuda import ipc, launch
from squawq.backends.cuda.group import CudaGroup
from squawq.backends.cuda.launch import Awaited, Sums

logger = logging.getLogger("squawq")


class Place(IntEnum):
    """Places in the buffers. No exchange takes the place of the one before it."""

    EMBEDDING = 0
    ATTENTION = 1
    MLP = 2
    TOKENS = 3
    LOGITS = 4


class Exchange(Protocol):
    """The exchanges of one decode step; every rank makes the same calls in the same order."""

    def alone(self) -> AbstractContextManager[None]:
        """While this is open nothing waits for other ranks, and results mean nothing; at its end all ranks are here."""

    def tokens(self, tokens: Tensor | None, rows: int, dependent: bool) -> Tensor:
        """Rank 0's `tokens`, int32 [rows]."""

    def all_reduce(self, sums: Sums, place: Place, dependent: bool) -> Sums:
        """The sums of all ranks."""

    def gather(self, logits: Tensor, dependent: bool) -> Tensor:
        """On rank 0 all ranks' logits [rows, own tokens] side by side, float32 [rows, vocab]; on others their own."""


class GroupExchange:
    """By the group."""

    def __init__(self, group: CudaGroup, vocabulary: Vocabulary) -> None:
        self._group, self._vocabulary = group, vocabulary
        self._alone = False

    @contextmanager
    def alone(self) -> Iterator[None]:
        self._alone = True
        yield
        self._alone = False
        self._group.barrier()

    def tokens(self, tokens: Tensor | None, rows: int, dependent: bool) -> Tensor:  # noqa: ARG002
        found = torch.empty(rows, dtype=torch.int32, device=self._group.device) if tokens is None else tokens.clone()
        if not self._alone:
            self._group.broadcast(found)
        return found

    def all_reduce(self, sums: Sums, place: Place, dependent: bool) -> Sums:  # noqa: ARG002
        total = sums.parts.sum(0)
        if sums.bias is not None:
            total += sums.bias
        if not self._alone:
            self._group.all_reduce(total)
        return Sums(total[None])

    def gather(self, logits: Tensor, dependent: bool) -> Tensor:  # noqa: ARG002
        if self._alone:
            return logits if self._group.rank else logits.new_zeros(len(logits), sum(self._vocabulary.each))
        return self._group.gather(logits, self._vocabulary.each)


@dataclass(frozen=True)
class Peers:
    """A buffer and counters in each rank's memory.

    Attributes:
        addresses: int64 [size] on the device: of the buffers, and of the counters.
        numbers: This rank's buffer, float32.
        counters: This rank's counters, int32.
        keep: What holds the memory.
    """

    addresses: tuple[Tensor, Tensor]
    numbers: Tensor
    counters: Tensor
    keep: Tensor


class PeerExchange:
    """By memory that all ranks can write.

    Args:
        rows: Rows of a step at most.
        hidden: Features of a row.
    """

    def __init__(self, group: CudaGroup, vocabulary: Vocabulary, rows: int, hidden: int) -> None:
        self._group, self._vocabulary, self._rows = group, vocabulary, rows
        shares = (rows * hidden * group.size,) * 3
        sizes = (*shares, rows, rows * sum(vocabulary.each))
        self._starts = [sum(sizes[:place]) for place in Place]
        self.peers = open_peers(group, sum(sizes), len(Place) * rows)

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._group.unawaited():
            yield
        self.peers.counters.zero_()
        self._group.barrier()

    def tokens(self, tokens: Tensor | None, rows: int, dependent: bool) -> Tensor:
        if tokens is not None:
            self._push(Sums(tokens.view(torch.float32)[None, None]), Place.TOKENS, dependent=dependent)
        launch.await_rows(self._awaited(Place.TOKENS, 1, launch.pushes(rows)), dependent)
        start = self._starts[Place.TOKENS]
        return self.peers.numbers[start : start + rows].view(torch.int32)

    def all_reduce(self, sums: Sums, place: Place, dependent: bool) -> Sums:
        _, rows, n = sums.parts.shape
        size, start = self._group.size, self._starts[place]
        self._push(sums, place, self._group.rank * rows * n, dependent=dependent)
        parts = self.peers.numbers[start : start + size * rows * n].view(size, rows, n)
        return Sums(parts, None, self._awaited(place, rows, size * launch.pushes(n)))

    def gather(self, logits: Tensor, dependent: bool) -> Tensor:
        each, rank, rows = self._vocabulary.each, self._group.rank, len(logits)
        vocab, start = sum(each), self._starts[Place.LOGITS]
        self._push(Sums(logits[None]), Place.LOGITS, sum(each[:rank]), vocab, 1, dependent)
        if rank:
            return logits
        launch.await_rows(self._awaited(Place.LOGITS, rows, sum(map(launch.pushes, each))), dependent)
        return self.peers.numbers[start : start + rows * vocab].view(rows, vocab)

    def _push(
        self, sums: Sums, place: Place, offset: int = 0, stride: int | None = None, targets: int | None = None,
        dependent: bool = False,
    ) -> None:  # fmt: skip
        to, first = self._starts[place] + offset, place * self._rows
        stride = sums.parts.shape[2] if stride is None else stride
        targets = self._group.size if targets is None else targets
        launch.push(sums, self.peers.addresses, targets, to, stride, first, dependent)

    def _awaited(self, place: Place, rows: int, count: int) -> Awaited:
        first = place * self._rows
        return Awaited(self.peers.counters[first : first + rows], count, (self._group.ended, self._group.seen_ended))


def exchange_for(group: CudaGroup, vocabulary: Vocabulary, rows: int, hidden: int) -> Exchange:
    """By peers' memory where it can be reached, else by the group."""
    try:
        return PeerExchange(group, vocabulary, rows, hidden)
    except RuntimeError as error:
        if group.rank == 0:
            logger.warning("the GPUs exchange by NCCL, since they cannot reach each other's memory: %s", error)
        return GroupExchange(group, vocabulary)


def open_peers(group: CudaGroup, numbers: int, counters: int) -> Peers:
    """Memory of so many float32 and int32 on each rank. Raises RuntimeError if the GPUs cannot reach each other's."""
    own = torch.zeros(numbers + counters, device=group.device)
    torch.cuda.synchronize(group.device)
    addresses = ipc.share(own.data_ptr(), group)
    buffers = torch.tensor(addresses, device=group.device)
    found = Peers((buffers, buffers + 4 * numbers), own[:numbers], own[numbers:].view(torch.int32), own)
    others = [address for rank, address in enumerate(addresses) if rank != group.rank]
    weakref.finalize(found, ipc.close, others)
    group.barrier()
    return found
