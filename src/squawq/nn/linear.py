"""A linear layer over dense or 4-bit weights, packed for the native kernels or not, behind one face."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from squawq.backends import dispatch
from squawq.backends.dispatch import Weight


@dataclass(frozen=True)
class Linear:
    """weight [out, in]: dense, integers, or packed; bias [out] or None (a packed weight may hold its own)."""

    weight: Weight
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in x's dtype."""
        return dispatch.matmul(x, self.weight, self.bias)
