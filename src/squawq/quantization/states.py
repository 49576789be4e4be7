"""The calibration's hidden states between layers: in memory while small, else in a file that the system pages.

The file has no name, so nothing of it stays however the process ends, and a run that goes on makes a new one.
Knows no model; the states are one tensor either way.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from squawq.errors import OutputError

IN_MEMORY = 1.0  # GiB
SAMPLED_TOKENS = 1024  # tokens on which modules and the whole layer are judged
ZEROS = bytes(1 << 24)


def hidden_states(
    shape: tuple[int, ...],
    folder: Path,
    device: str,
    in_memory: float = IN_MEMORY,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[blocks, tokens, hidden] to be filled: on `device` up to `in_memory` GiB, else mapped from a file.

    The file lies in `folder` and takes its disk at once, so that a full disk shows now and as OutputError; a mapping
    that finds no room later ends the process.
    """
    size = dtype.itemsize * math.prod(shape)
    if size <= in_memory * 2**30:
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            for start in range(0, size, len(ZEROS)):
                file.write(ZEROS[: size - start])
            file.flush()
            return torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(size,))).view(dtype).view(shape)
    except OSError as error:
        raise OutputError(
            f"{folder}: the calibration's hidden states need {size / 1e9:.1f} GB of disk there: {error.strerror}. Make "
            "room, take fewer or shorter samples, or keep more of them in memory (--states-memory)"
        ) from error


@dataclass(frozen=True)
class Sample:
    """The blocks on which losses are judged, spread over all `tokens`; this process holds the blocks of `share`."""

    blocks: Tensor
    share: slice
    tokens: int

    @classmethod
    def spread(cls, blocks: int, tokens: int, share: slice) -> Sample:
        """Some of so many blocks of so many tokens: SAMPLED_TOKENS of them, and at least a block."""
        count = max(1, min(blocks, SAMPLED_TOKENS // tokens))
        return cls(torch.linspace(0, blocks - 1, count).round().long(), share, blocks * tokens)

    def of(self, states: Tensor) -> Tensor:
        """float32 [sampled blocks, tokens, hidden] of this process's states; zero where another has the block."""
        here = (self.blocks >= self.share.start) & (self.blocks < self.share.stop)
        found = torch.zeros(len(self.blocks), *states.shape[1:], device=states.device)
        found[here] = states[self.blocks[here] - self.share.start]
        return found
