"""AWQ's group-wise 4-bit integers: rounding to them, back to floats, and packing in AWQ GEMM's nibble order.

A weight [out, in] is cut along `in` into groups that share a scale and a zero: w = (q - zero) * scale, q in 0..15.
Packed as AutoAWQ does (awq/modules/linear/gemm.py, packing_utils.py): words run along out_features; bits 4i..4i+3 of
word c hold output channel 8c + ORDER[i].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from squawq.errors import CheckpointError

LEVELS = 15  # the largest integer
SYMMETRIC_ZERO = 8
MIN_SCALE = 1e-5  # not 0 in float16, so a group of zeros stays zeros (AutoAWQ clamps high - low to this instead)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ GEMM's nibble order
PER_WORD = 8  # integers in an int32
PACKED = ("qweight", "scales", "qzeros")  # tensors that replace a linear's weight


@dataclass(frozen=True)
class GroupwiseTensor:
    """q uint8 [out, in] and zeros uint8 [out, groups], 0..15; scales [out, groups], float16 unless loaded otherwise.

    order: int64 [in]: column i of q is input order[i] of the linear (activation order); None: they are in order.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor
    order: Tensor | None = None

    def rows(self, part: slice) -> GroupwiseTensor:
        """Some of the output channels."""
        return GroupwiseTensor(self.q[part], self.scales[part], self.zeros[part], self.order)

    def in_own_order(self) -> tuple[Tensor, Tensor]:
        """q with the linear's inputs in their own order, and the group of each, int32 [in] (g_idx)."""
        in_features = self.q.shape[1]
        groups = torch.arange(in_features, dtype=torch.int32) // (in_features // self.scales.shape[1])
        if self.order is None:
            return self.q, groups
        own = self.order.argsort()
        return self.q[:, own], groups[own]

    def dequantize(self) -> Tensor:
        """The weight, float32 [out, in]."""
        out, groups = self.scales.shape
        weight = self.q.reshape(out, groups, -1).float()
        weight.sub_(self.zeros[..., None].float()).mul_(self.scales[..., None].float())  # in place: these are large
        weight = weight.view(out, -1)
        return weight if self.order is None else weight[:, self.order.argsort()]


def scale_and_zero(low: Tensor, high: Tensor, zero_point: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero for ranges `low`..`high` of one shape, all float32; scales are float16 values, zeros integers.

    A range is widened to contain 0, so that a group of one sign keeps its values.
    """
    if zero_point:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / LEVELS).clamp(min=MIN_SCALE).half().float()
        return scale, (-low / scale).round().clamp(0, LEVELS)
    extent = torch.maximum(low.abs(), high.abs())
    scale = (extent / (LEVELS - SYMMETRIC_ZERO)).clamp(min=MIN_SCALE).half().float()
    return scale, torch.full_like(scale, SYMMETRIC_ZERO)


def round_to_grid(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Nearest integers 0..15, as float32, for `weight` [..., group] with scale and zero [..., 1]."""
    return (weight / scale).round_().add_(zero).clamp_(0, LEVELS)


def quantize(
    weight: Tensor, group: int, zero_point: bool, limits: tuple[Tensor, Tensor] | None = None
) -> GroupwiseTensor:
    """Round a weight [out, in] to nearest in groups of `group`; `limits` (low, high) [out, groups] clip it."""
    grouped = weight.float().view(weight.shape[0], -1, group)
    low, high = (grouped.amin(-1), grouped.amax(-1)) if limits is None else limits
    scale, zero = scale_and_zero(low, high, zero_point)
    q = round_to_grid(grouped, scale[..., None], zero[..., None])
    return GroupwiseTensor(q.to(torch.uint8).view(weight.shape), scale.half(), zero.to(torch.uint8))


def fake_quantize(weight: Tensor, group: int, zero_point: bool) -> Tensor:
    """A weight [out, in] quantized and dequantized, float32 [out, in]."""
    return quantize(weight, group, zero_point).dequantize()


def pack(values: Tensor, order: tuple[int, ...] = ORDER) -> Tensor:
    """Integers 0..15 of any dtype [rows, out] -> int32 [rows, out / 8]; nibble i of a word holds value order[i]."""
    words = values.view(values.shape[0], -1, PER_WORD)
    packed = torch.zeros(words.shape[:2], dtype=torch.int32, device=values.device)
    for nibble, channel in enumerate(order):
        packed |= words[:, :, channel].to(torch.int32) << (4 * nibble)
    return packed


def unpack(words: Tensor) -> Tensor:
    """The inverse of `pack` in ORDER: int32 [rows, out / 8] -> uint8 [rows, out]."""
    values = torch.empty((*words.shape, PER_WORD), dtype=torch.uint8, device=words.device)
    for nibble, channel in enumerate(ORDER):
        values[:, :, channel] = ((words >> (4 * nibble)) & 15).to(torch.uint8)
    return values.view(words.shape[0], -1)


def to_gemm(tensor: GroupwiseTensor) -> dict[str, Tensor]:
    """Pack for AWQ GEMM: qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales [groups, out]."""
    return {
        "qweight": pack(tensor.q.T.contiguous()),
        "qzeros": pack(tensor.zeros.T.contiguous()),
        "scales": tensor.scales.T.contiguous(),
    }


def check_gemm(qweight: Tensor, scales: Tensor, qzeros: Tensor | None) -> None:
    """Raises CheckpointError if dtypes or shapes do not fit together."""
    rows, out = qweight.shape[0], qweight.shape[-1] * PER_WORD
    groups = scales.shape[0]
    if qweight.dtype != torch.int32 or qweight.dim() != 2:
        raise CheckpointError(
            f"qweight is {qweight.dtype} {tuple(qweight.shape)}; it must be int32 with two dimensions"
        )
    if not scales.dtype.is_floating_point:
        raise CheckpointError(f"scales are {scales.dtype}; they must be floating point")
    if scales.dim() != 2 or scales.shape[1] != out or groups == 0 or rows % groups:
        raise CheckpointError(f"scales {tuple(scales.shape)} do not fit qweight {tuple(qweight.shape)}")
    if qzeros is not None and (qzeros.dtype != torch.int32 or tuple(qzeros.shape) != (groups, out // PER_WORD)):
        raise CheckpointError(f"qzeros {tuple(qzeros.shape)} do not fit qweight {tuple(qweight.shape)}")


def from_gemm(qweight: Tensor, scales: Tensor, qzeros: Tensor | None) -> GroupwiseTensor:
    """The inverse of `to_gemm`. Symmetric checkpoints may lack `qzeros`: each zero is 8.

    Raises CheckpointError if dtypes or shapes do not fit together.
    """
    check_gemm(qweight, scales, qzeros)
    shape = tuple(scales.shape)
    zeros = (
        torch.full(shape, SYMMETRIC_ZERO, dtype=torch.uint8, device=scales.device) if qzeros is None else unpack(qzeros)
    )
    return GroupwiseTensor(unpack(qweight).T.contiguous(), scales.T.contiguous(), zeros.T.contiguous())


def dequantize_gemm(qweight: Tensor, scales: Tensor, qzeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight [in, out] in `dtype`, rounded once: no transposed copies, and 16-bit where that is exact enough.

    Raises CheckpointError when dtypes or shapes do not belong together.
    """
    check_gemm(qweight, scales, qzeros)
    wide = torch.promote_types(scales.dtype, dtype)
    groups, out = scales.shape
    weight = unpack(qweight).view(groups, -1, out).to(wide)
    weight.sub_(SYMMETRIC_ZERO if qzeros is None else unpack(qzeros).view(groups, 1, out).to(wide))
    return weight.mul_(scales.view(groups, 1, out).to(wide)).view(-1, out).to(dtype)
