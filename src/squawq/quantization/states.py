"""Storage for hidden states of all calibration tokens: in memory while small, else in a temporary file.

Hidden states between layers are one tensor, mapped from its file; what is written once and read in the same order is a
spool. Files are unlinked at once, so nothing of them remains however the process ends.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from squawq.errors import OutputError

IN_MEMORY = 1.0  # GiB
SAMPLED_TOKENS = 1024  # that losses of modules and of the whole layer are measured on
ZEROS = bytes(1 << 24)


def hidden_states(shape: tuple[int, int, int], folder: Path, device: str, in_memory: float = IN_MEMORY) -> Tensor:
    """Allocate float32 [blocks, tokens, hidden]: on `device` up to `in_memory` GiB, else as a file in `folder`.

    The file takes its disk space at once: a mapping that finds no room later would kill the process.

    Raises:
        OutputError: The disk is full.
    """
    size = torch.float32.itemsize * math.prod(shape)
    if size <= in_memory * 2**30:
        return torch.empty(shape, device=device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            for start in range(0, size, len(ZEROS)):
                file.write(ZEROS[: size - start])
            file.flush()
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))
    except OSError as error:
        raise _no_room(folder, size, error) from error


def _no_room(folder: Path, size: int, error: OSError) -> OutputError:
    return OutputError(
        f"{folder}: the calibration's hidden states need {size / 1e9:.1f} GB of disk there: {error.strerror}. Make "
        "room, take fewer or shorter samples, or keep more of them in memory (--states-memory)"
    )


class Spool:
    """A list of tensors, read in the order in which they were added, as often as wanted.

    Up to `in_memory` GiB stay as they are, the rest goes to a file in `folder`. A tensor must not change once added.
    """

    def __init__(self, folder: Path, in_memory: float) -> None:
        self._folder, self._room = folder, in_memory * 2**30
        self._pieces: list[Tensor] = []
        self._file: FileIO | None = None
        self._filed: list[tuple[torch.Size, torch.dtype, torch.device]] = []

    def add(self, piece: Tensor) -> None:
        """Raises OutputError where the disk is full."""
        self._room -= piece.nbytes
        if self._file is None and self._room >= 0:
            self._pieces.append(piece)
            return
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            self._file.seek(0, os.SEEK_END)
            left = piece.contiguous().cpu().view(torch.uint8).numpy().ravel()
            while len(left):
                left = left[self._file.write(left.data) :]
        except OSError as error:
            raise _no_room(self._folder, piece.nbytes, error) from error
        self._filed.append((piece.shape, piece.dtype, piece.device))

    def __iter__(self) -> Iterator[Tensor]:
        yield from self._pieces
        place = 0
        for shape, dtype, device in self._filed:
            assert self._file is not None
            found = torch.empty(shape, dtype=dtype)
            left = found.view(torch.uint8).numpy().ravel()
            self._file.seek(place)
            place += len(left)
            while len(left):
                left = left[self._file.readinto(left.data) :]
            yield found.to(device)


@dataclass(frozen=True)
class Sample:
    """The blocks that losses are measured on, spread over all `tokens`; this rank holds the blocks of `share`."""

    blocks: Tensor
    share: slice
    tokens: int

    @classmethod
    def spread(cls, blocks: int, tokens: int, share: slice) -> Sample:
        """About SAMPLED_TOKENS of `blocks` blocks of `tokens` tokens each, at least one block."""
        count = max(1, min(blocks, SAMPLED_TOKENS // tokens))
        return cls(torch.linspace(0, blocks - 1, count).round().long(), share, blocks * tokens)

    def of(self, states: Tensor) -> Tensor:
        """The sampled states, float32 [sampled blocks, tokens, hidden]; zero where another rank has the block."""
        here = (self.blocks >= self.share.start) & (self.blocks < self.share.stop)
        found = torch.zeros(len(self.blocks), *states.shape[1:], device=states.device)
        found[here] = states[self.blocks[here] - self.share.start]
        return found
