"""Group-wise 4-bit integers: rounding to them and back. Knows no nibble order and no files.

A weight [out, in] is cut along `in` into groups that share a scale and a zero: w = (q - zero) * scale, q in 0..15.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 15
SYMMETRIC_ZERO = 8
MIN_SCALE = 1e-5  # AutoAWQ's floor; far above float16's smallest, so a group of zeros stays a group of zeros


@dataclass(frozen=True)
class GroupwiseTensor:
    """q uint8 [out, in] of 0..15; scales float16 [out, groups]; zeros uint8 [out, groups] of 0..15."""

    q: Tensor
    scales: Tensor
    zeros: Tensor

    def rows(self, part: slice) -> GroupwiseTensor:
        """Some of the output channels."""
        return GroupwiseTensor(self.q[part], self.scales[part], self.zeros[part])

    def dequantize(self) -> Tensor:
        """float32 [out, in]."""
        out, groups = self.scales.shape
        weight = self.q.reshape(out, groups, -1).float()
        weight.sub_(self.zeros[..., None].float()).mul_(self.scales[..., None].float())  # in place: these are large
        return weight.view(out, -1)


def scale_and_zero(low: Tensor, high: Tensor, zero_point: bool) -> tuple[Tensor, Tensor]:
    """Scale (float32 holding float16 values) and zero (float32, whole) for ranges `low`..`high` of any equal shape.

    The range is widened to contain 0, so that a group of one sign keeps its values.
    """
    if zero_point:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / LEVELS).clamp(min=MIN_SCALE).half().float()
        return scale, (-low / scale).round().clamp(0, LEVELS)
    extent = torch.maximum(low.abs(), high.abs())
    scale = (extent / (LEVELS - SYMMETRIC_ZERO)).clamp(min=MIN_SCALE).half().float()
    return scale, torch.full_like(scale, SYMMETRIC_ZERO)


def round_to_grid(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Integers 0..15 (as float32) for `weight` [..., group] with scale and zero [..., 1]."""
    return (weight / scale).round_().add_(zero).clamp_(0, LEVELS)


def quantize(
    weight: Tensor, group: int, zero_point: bool, limits: tuple[Tensor, Tensor] | None = None
) -> GroupwiseTensor:
    """Round a weight [out, in] to nearest in groups of `group`; `limits` (low, high) [out, groups] narrow ranges."""
    grouped = weight.float().view(weight.shape[0], -1, group)
    low, high = (grouped.amin(-1), grouped.amax(-1)) if limits is None else limits
    scale, zero = scale_and_zero(low, high, zero_point)
    q = round_to_grid(grouped, scale[..., None], zero[..., None])
    return GroupwiseTensor(q.to(torch.uint8).view(weight.shape), scale.half(), zero.to(torch.uint8))


def fake_quantize(weight: Tensor, group: int, zero_point: bool) -> Tensor:
    """quantize and dequantize in one: float32 [out, in]."""
    return quantize(weight, group, zero_point).dequantize()
