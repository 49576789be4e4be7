"""The paged key-value cache of all layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from squawq.backends.base import Backend, Pages
from squawq.config import ModelConfig


class Cache:
    """Pages of all layers, zero at first, in the backend's layout.

    Memory: pages * backend.page_size * token_bytes(config, backend.cache_dtype); on the CPU only of the pages that were
    written.
    """

    def __init__(self, config: ModelConfig, pages: int, backend: Backend) -> None:
        _, kv, dim = config.heads
        shapes = backend.page_shapes(kv, dim)
        shape = (config.num_layers, 2, pages, math.prod(shapes[0]))
        self._store = zeros(shape, backend.cache_dtype, backend.device)
        key, value = shapes
        self.layers: list[Pages] = [(k.view(pages, *key), v.view(pages, *value)) for k, v in self._store]

    @staticmethod
    def token_bytes(config: ModelConfig, dtype: torch.dtype = torch.float16) -> int:
        """Bytes of one token's keys and values in all layers."""
        return config.num_layers * 2 * math.prod(config.cached_heads) * dtype.itemsize

    def copy(self, source: int, target: int) -> None:
        """Copy one page to another, in every layer."""
        self._store[:, :, target] = self._store[:, :, source]

    def take(self, pages: Sequence[int], other: Cache) -> None:
        """Copy these pages from `other`, a cache of the same shape, one at a time: together they may be gigabytes."""
        for page in pages:
            self._store[:, :, page] = other._store[:, :, page]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU numpy's, which take no memory until they are written; torch's do."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    bits = {1: np.int8, 2: np.int16, 4: np.int32}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, bits)).view(dtype)
