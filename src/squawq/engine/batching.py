"""A step's chunks as the tensors that a model runs on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from squawq.backends.base import Batch
from squawq.backends.sampling import Chunk


def batch_of(chunks: Sequence[Chunk], page_size: int, device: torch.device) -> Batch:
    """All tokens of a step, one row each, sequence after sequence; `Chunk.logits` rows of each are outputs."""
    ids: list[int] = []
    pages: list[int] = []
    outputs: list[int] = []
    sequences, positions, slots = [], [], []
    for chunk in chunks:
        rows, first = len(chunk.ids), len(ids)
        sequences.append((first, rows, chunk.start, len(pages)))
        at = np.arange(chunk.start, chunk.start + rows)
        table = np.asarray(chunk.pages[: -(-(chunk.start + rows) // page_size)])
        positions.append(at)
        slots.append(table[at // page_size] * page_size + at % page_size)
        outputs.extend(range(first + rows - chunk.logits, first + rows))
        ids.extend(chunk.ids)
        pages.extend(table.tolist())

    def tensor(values: Sequence[int] | NDArray[np.int64]) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int64).to(device, non_blocking=True)

    return Batch(
        ids=tensor(ids),
        positions=tensor(np.concatenate(positions)),
        slots=tensor(np.concatenate(slots)),
        sequences=torch.as_tensor(sequences, dtype=torch.int64),
        pages=tensor(pages).int(),
        outputs=tensor(outputs),
        places=torch.as_tensor([chunk.slot for chunk in chunks], dtype=torch.int64),
    )
