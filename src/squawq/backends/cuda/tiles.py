"""Tile sizes of the INT4 products for each kind of card, and what is split into how many parts.

Tiles change the time, and no bit of the results. Numbers of parts change the order of sums: they are the same on all
cards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from squawq.moe_config import MoeConfig

CHUNKS = 32  # most parts of a sequence, in decode attention
ENOUGH = 512  # programs that keep a large card busy
MIN_BLOCKS = 2  # of a split
PROMPT_ROWS = 1024  # tokens of a prompt that run through experts at a time


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

TOKENS = sorted({tokens for table in (DEFAULT, *TABLES.values()) for tokens in table})


def tile(rows: int, out: int, device: torch.device) -> Tile:
    """For a product of so many rows and outputs."""
    table = TABLES.get(_capability(device), DEFAULT)
    tokens = next((tokens for tokens in table if tokens >= rows), max(table))
    return table[tokens][out > WIDE]


def split_count(out: int, blocks: int) -> int:
    """How many parts a product's inputs, blocks of 64, are split into."""
    wanted = 1
    while wanted < 16 and -(-out // 64) * wanted < ENOUGH and blocks // (2 * wanted) >= MIN_BLOCKS:
        wanted *= 2
    return -(-blocks // -(-blocks // wanted))


def most_tiles(pairs: int, experts: int, tokens: int) -> int:
    """Tiles of so many tokens that pairs of a token and one of its experts fill at most, however they are spread."""
    return min(pairs, min(pairs, experts) + pairs // tokens)


def expert_bytes(moe: MoeConfig, hidden: int, rows: int, *, split: bool) -> int:
    """Bytes that a layer's experts keep of a step of so many rows. split: as in `experts.run`."""
    shapes = (2 * moe.inner, hidden), (hidden, moe.inner)
    parts = [split_count(out * moe.top_k, -(-in_ // 128)) if split else 1 for out, in_ in shapes]
    pair = sum(4 * out * count for (out, _), count in zip(shapes, parts, strict=True)) + 2 * moe.inner + 8
    outputs = moe.experts + 1
    row = 4 * (outputs * split_count(outputs, -(-hidden // 64)) + hidden)
    slots = max(4 * (tokens + 1) * most_tiles(rows * moe.top_k, moe.experts, tokens) for tokens in TOKENS)
    return rows * (moe.top_k * pair + row) + slots


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
