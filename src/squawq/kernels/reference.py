"""Plain torch for every operation: the truth that other kernels are tested against. Slow on purpose, never wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from squawq.format.groupwise import GroupwiseTensor


def int4_matmul(x: Tensor, weight: GroupwiseTensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times the dequantized weight [out, in], computed in float32, returned as x's dtype."""
    return F.linear(x.float(), weight.dequantize(), None if bias is None else bias.float()).to(x.dtype)


def dense_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times a dense weight [out, in] in x's dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zhang and Sennrich, arXiv 1910.07467: x / rms(x) * weight over the last dimension, in float32 inside."""
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight.to(x.dtype)
