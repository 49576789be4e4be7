"""A linear layer over dense or 4-bit weights, behind one face."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from squawq.format.groupwise import GroupwiseTensor
from squawq.kernels import dispatch


@dataclass(frozen=True)
class Linear:
    """weight: dense [out, in], or integers of that shape; bias [out] or None."""

    weight: Tensor | GroupwiseTensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in x's dtype."""
        if isinstance(self.weight, GroupwiseTensor):
            return dispatch.int4_matmul(x, self.weight, self.bias)
        return dispatch.dense_matmul(x, self.weight, self.bias)

    def dequantized(self) -> Linear:
        """The same function over a dense float32 weight."""
        return Linear(self.weight.dequantize(), self.bias) if isinstance(self.weight, GroupwiseTensor) else self
