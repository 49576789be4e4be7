"""AWQ GEMM's nibble order: integers of a linear to int32 words and back.

Layout as AutoAWQ writes it (awq/modules/linear/gemm.py, packing_utils.py): words run along out_features;
bits 4i..4i+3 of word c hold output channel 8c + ORDER[i].
"""

from __future__ import annotations

import torch
from torch import Tensor

from squawq.errors import CheckpointError
from squawq.format.groupwise import SYMMETRIC_ZERO, GroupwiseTensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PER_WORD = 8
PACKED = ("qweight", "scales", "qzeros")  # what a linear's weight becomes


def pack(values: Tensor) -> Tensor:
    """Integers 0..15 of any dtype [rows, out] -> int32 [rows, out / 8]."""
    words = values.view(values.shape[0], -1, PER_WORD)
    packed = torch.zeros(words.shape[:2], dtype=torch.int32, device=values.device)
    for nibble, channel in enumerate(ORDER):
        packed |= words[:, :, channel].to(torch.int32) << (4 * nibble)
    return packed


def unpack(words: Tensor) -> Tensor:
    """int32 [rows, out / 8] -> uint8 [rows, out]."""
    values = torch.empty((*words.shape, PER_WORD), dtype=torch.uint8, device=words.device)
    for nibble, channel in enumerate(ORDER):
        values[:, :, channel] = ((words >> (4 * nibble)) & 15).to(torch.uint8)
    return values.view(words.shape[0], -1)


def to_gemm(tensor: GroupwiseTensor) -> dict[str, Tensor]:
    """qweight int32 [in, out/8], qzeros int32 [groups, out/8], scales float16 [groups, out]."""
    return {
        "qweight": pack(tensor.q.T.contiguous()),
        "qzeros": pack(tensor.zeros.T.contiguous()),
        "scales": tensor.scales.T.contiguous(),
    }


def check_gemm(qweight: Tensor, scales: Tensor, qzeros: Tensor | None) -> None:
    """Raises CheckpointError when dtypes or shapes do not belong together."""
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
    """The inverse of to_gemm. `qzeros` may be missing in symmetric checkpoints: 8 is meant.

    Raises CheckpointError when dtypes or shapes do not belong together.
    """
    check_gemm(qweight, scales, qzeros)
    shape = tuple(scales.shape)
    zeros = (
        torch.full(shape, SYMMETRIC_ZERO, dtype=torch.uint8, device=scales.device) if qzeros is None else unpack(qzeros)
    )
    return GroupwiseTensor(unpack(qweight).T.contiguous(), scales.T.contiguous(), zeros.T.contiguous())
