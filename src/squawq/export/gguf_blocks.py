"""Q4_1, llama.cpp's blocks of 32 weights with a scale and a minimum, made of quantized groups. Knows no files."""

from __future__ import annotations

import torch
from torch import Tensor

from squawq.errors import CheckpointError
from squawq.format.groupwise import GroupwiseTensor

BLOCK = 32  # weights that share a scale and a minimum in Q4_1
BLOCK_BYTES = 2 + 2 + BLOCK // 2


def q4_1(tensor: GroupwiseTensor) -> Tensor:
    """Q4_1 rows, uint8 [out, in / 32 * 20], of groups of a multiple of 32: w = d * q + m.

    d is the scale and m is -zero * scale, both float16. Integers and scales stay as they are. m is rounded once, by at
    most zero * scale * 2**-11, so that no weight moves by more than 15 / 2048 (0.74 %) of its scale; for the zeros 0,
    1, 2, 4 and 8 not at all. Scales below 6e-5, float16's smallest normal number, lose digits. Raises CheckpointError
    where float16 cannot hold a scale or minimum.
    """
    out, groups = tensor.scales.shape
    scale = tensor.scales.to(torch.float16)
    minimum = (0 - tensor.zeros.float() * scale.float()).to(torch.float16)
    if not (scale.isfinite().all() and minimum.isfinite().all()):
        raise CheckpointError("a scale, or its product with the zero, is beyond float16")
    head = torch.stack([scale, minimum], -1).view(torch.uint8)
    head = head.repeat_interleave(tensor.q.shape[1] // groups // BLOCK, 1)
    halves = tensor.q.reshape(out, -1, 2, BLOCK // 2)  # the low nibbles hold a block's first half
    return torch.cat([head, halves[:, :, 0] | halves[:, :, 1] << 4], -1).view(out, -1)


def by_columns(tensor: GroupwiseTensor, columns: Tensor) -> GroupwiseTensor:
    """Permute the input columns. Raises CheckpointError if a group is split."""
    group = tensor.q.shape[1] // tensor.scales.shape[1]
    groups = columns.view(-1, group)
    if not bool((groups // group == groups[:, :1] // group).all()):
        raise CheckpointError(f"a group of {group} inputs spans several heads; export the model as dense")
    order = groups[:, 0] // group
    return GroupwiseTensor(tensor.q[:, columns], tensor.scales[:, order], tensor.zeros[:, order])
