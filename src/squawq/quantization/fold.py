"""Moves scales out of a linear's input into the operation before it, so that the layer's function stays the same."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_scales(norm: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A norm's weight divided by `scales` and rounded to `dtype`, and the scales that this rounded weight stands for.

    norm, scales float32 [features]; both results float32. Multiplying the linear's columns by the second result
    undoes the rounding of the first exactly, so folding costs nothing even in bfloat16.
    """
    folded = (norm / scales).to(dtype).float()
    usable = (folded != 0) & torch.isfinite(folded)
    return torch.where(usable, folded, norm), torch.where(usable, norm / folded, torch.ones_like(scales))
