"""Inverse frequencies of rotary position embeddings (RoPE; Su et al., arXiv 2104.09864), scaled as the config says."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from squawq.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """float32 [rotated pairs], in radians per position.

    "linear" divides all frequencies by `factor`. "llama3" (Llama 3.1's reference code) divides those with wavelengths
    above original / low_freq_factor, keeps those below original / high_freq_factor, and interpolates between.
    """
    dim = int(head_dim * rope.partial) // 2 * 2
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if rope.type == "default":
        return frequencies
    if rope.type == "linear":
        return frequencies / rope.factor
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / rope.factor
