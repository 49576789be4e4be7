"""Inverse frequencies of rotary position embeddings (RoPE; Su et al., arXiv 2104.09864), scaled as the config says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from squawq.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """float32 [rotated pairs], in radians per position.

    "linear" divides all frequencies by `factor`. "llama3" (Llama 3.1's reference code) divides those with wavelengths
    above original / low_freq_factor, keeps those below original / high_freq_factor, and interpolates between. "yarn"
    (Peng et al., arXiv 2309.00071) interpolates between the pairs that turn beta_fast and beta_slow times within the
    original context. "longrope" (Ding et al., arXiv 2402.13753) divides each by its own factor.
    """
    dim = 2 * rope.pairs(head_dim)
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    match rope.type:
        case "linear":
            return frequencies / rope.factor
        case "longrope":
            return frequencies / torch.tensor(rope.factors)
        case "llama3":
            turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
            keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        case "yarn":
            keep = 1 - _yarn_ramp(rope, dim)
        case _:
            return frequencies
    return keep * frequencies + (1 - keep) * frequencies / rope.factor


def _yarn_ramp(rope: RopeConfig, dim: int) -> Tensor:
    """float32 [dim / 2]: 0 where a frequency is kept, 1 where it is interpolated (equation 23)."""

    def pair(turns: float) -> float:  # that turns so often within the original context
        return (
            dim * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        )

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)


class RotaryTable:
    """cos and sin of several kinds of layers side by side: one set of columns for each different RoPE.

    Attributes:
        frequencies: float32 [2, columns]: radians per position, and factors of cos and sin.
    """

    def __init__(self, ropes: Sequence[RopeConfig | None], head_dim: int) -> None:
        self._first: dict[RopeConfig, int] = {}
        parts: list[Tensor] = []
        for rope in dict.fromkeys(rope for rope in ropes if rope is not None):
            self._first[rope] = sum(part.shape[1] for part in parts)
            found = inverse_frequencies(rope, head_dim)
            parts.append(torch.stack([found, torch.full_like(found, rope.magnitude)]))
        self.frequencies = torch.cat(parts, 1) if parts else torch.zeros(2, 1)

    def first(self, rope: RopeConfig | None) -> int:
        """The first column of a layer's RoPE."""
        return 0 if rope is None else self._first[rope]
