"""MXFP4, as gpt-oss stores its experts: 4-bit floats in blocks of 32 that share a power of two.

OCP Microscaling Formats (MX) Specification 1.0: elements are E2M1, scales E8M0 with a bias of 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS, SCALES = "_blocks", "_scales"  # endings of the tensors' names, after the weight's
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """Dequantize rows of a weight.

    Args:
        blocks: uint8 [out, in / 32, 16]: two values a byte, the first in the low nibble.
        scales: uint8 [out, in / 32]; 255 stands for NaN.

    Returns:
        float32 [out, in].
    """
    table = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], device=blocks.device)
    values = table[torch.stack((blocks & 15, blocks >> 4), -1).long()].flatten(-2)
    ones = torch.ones_like(scales, dtype=torch.float32)
    factors = torch.ldexp(ones, scales.int() - 127).masked_fill_(scales == 255, torch.nan)
    return (values * factors[..., None]).flatten(-2)
