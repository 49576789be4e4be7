"""Frequencies of the rotary position embedding (Su et al., arXiv 2104.09864) with Llama 3.1's scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from squawq.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """float32 [head_dim / 2], radians per position.

    "llama3" leaves wavelengths below original / high_freq_factor alone, divides those above
    original / low_freq_factor by `factor` and blends in between (Llama 3.1's reference code).
    """
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.type == "default":
        return frequencies
    if rope.type == "linear":
        return frequencies / rope.factor
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / rope.factor
