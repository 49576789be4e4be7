"""Tile sizes of the INT4 products for each kind of card. They change the time, and no bit of the results."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """What a program computes, by how many warps, with how many blocks of inputs in flight."""

    tokens: int
    outputs: int
    warps: int
    stages: int = 3


# For up to so many rows: the tile for few outputs, and that for more than WIDE. Measured with 8B shapes.
WIDE = 8192
TABLES = {
    (9, 0): {  # H200, 2026-11
        8: (Tile(8, 64, 2), Tile(8, 64, 2)),
        16: (Tile(16, 64, 4), Tile(16, 64, 4)),
        32: (Tile(32, 64, 4), Tile(32, 128, 4)),
        64: (Tile(64, 128, 8), Tile(64, 128, 8)),
        128: (Tile(128, 128, 8), Tile(128, 128, 8)),
    },
}
DEFAULT = {  # compiled for capabilities 8.0 to 8.9: at most 49 KiB of shared memory, of the 99 that the smallest have
    8: (Tile(8, 64, 2), Tile(8, 64, 2)),
    16: (Tile(16, 64, 4), Tile(16, 64, 4)),
    32: (Tile(32, 64, 4), Tile(32, 64, 4)),
    64: (Tile(64, 128, 8), Tile(64, 128, 8)),
}


def tile(rows: int, out: int, device: torch.device) -> Tile:
    """For a product of so many rows and outputs."""
    table = TABLES.get(_capability(device), DEFAULT)
    tokens = next((tokens for tokens in table if tokens >= rows), max(table))
    return table[tokens][out > WIDE]


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
