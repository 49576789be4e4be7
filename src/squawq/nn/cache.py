"""The paged key-value cache of all layers, and the states of sequences in layers with linear attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from squawq.backends.base import Backend, LayerCache
from squawq.config import ModelConfig
from squawq.delta_config import LINEAR


class Cache:
    """Pages of all layers, zero at first, in the backend's layout.

    Memory: pages * backend.page_size * token_bytes(config, backend.cache_dtype), and places * state_bytes(config); on
    the CPU only of what was written.

    Args:
        places: Sequences whose states have a place.
    """

    def __init__(self, config: ModelConfig, pages: int, backend: Backend, places: int = 1) -> None:
        _, kv, dim = config.heads
        key, value = backend.page_shapes(kv, dim)
        self._store = zeros((config.kv_layers, 2, pages, math.prod(key)), backend.cache_dtype, backend.device)
        held: Iterator[LayerCache] = ((k.view(pages, *key), v.view(pages, *value)) for k, v in self._store)

        def states() -> LayerCache:
            assert config.delta_rule is not None
            first, second = config.delta_rule.state_shapes
            kind, device = torch.float32, backend.device
            return zeros((places, *first), kind, device), zeros((places, *second), kind, device)

        self.layers: list[LayerCache] = [states() if kind == LINEAR else next(held) for kind in config.layer_types]

    @staticmethod
    def token_bytes(config: ModelConfig, dtype: torch.dtype = torch.float16) -> int:
        """Bytes of one token's keys and values in all layers."""
        return config.kv_layers * 2 * math.prod(config.cached_heads) * dtype.itemsize

    @staticmethod
    def state_bytes(config: ModelConfig) -> int:
        """Bytes of one sequence's states in all layers; 0 where none has any."""
        if config.delta_rule is None:
            return 0
        layers = sum(kind == LINEAR for kind in config.layer_types)
        return layers * torch.float32.itemsize * sum(map(math.prod, config.delta_rule.state_shapes))

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
