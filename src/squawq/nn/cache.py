"""Keys and values in pages of 16 tokens, and the batch of one step that reads and writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from squawq.backends.reference import PAGE
from squawq.config import ModelConfig


@dataclass(frozen=True)
class Batch:
    """One step's tokens, a row each, sequence after sequence.

    ids, positions, slots: int64 [rows]; a slot is page * 16 + place. sequences int64 [sequences, 4] and pages int32:
    see backends/reference.py. outputs: int64, the rows whose logits are wanted.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    sequences: Tensor
    pages: Tensor
    outputs: Tensor


class Cache:
    """Pages of all layers, float16, zeros at first. On a CPU a page takes memory when it is first written.

    Memory: pages * 16 * token_bytes(config).
    """

    def __init__(self, config: ModelConfig, pages: int, device: str = "cpu") -> None:
        _, kv, dim = config.heads
        shape = (config.num_layers, 2, pages, kv * dim * PAGE)
        if device == "cpu":  # numpy's zeros are not touched until they are written, torch's are
            store = torch.from_numpy(np.zeros(shape, np.float16))
        else:
            store = torch.zeros(shape, dtype=torch.float16, device=device)
        self._store = store
        self._layers = [(k.view(pages, kv, dim, PAGE), v.view(pages, kv, PAGE, dim)) for k, v in store]

    @staticmethod
    def token_bytes(config: ModelConfig) -> int:
        """Bytes of one token's keys and values in all layers."""
        return config.num_layers * 2 * config.num_kv_heads * config.head_dim * 2

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """keys [pages, kv_heads, head_dim, 16] and values [pages, kv_heads, 16, head_dim] of a layer."""
        return self._layers[index]

    def copy(self, source: int, target: int) -> None:
        """Give page `target` what page `source` holds, in every layer."""
        self._store[:, :, target] = self._store[:, :, source]

    def take(self, pages: Sequence[int], other: Cache) -> None:
        """Hold in these pages what `other`, of the same shape, holds in its."""
        for page in pages:
            self._store[:, :, page] = other._store[:, :, page]
