"""WQLinear_GEMM: one linear in AWQ GEMM's layout, packed and run in plain torch. To run fast, load the whole model.

Tensors and words as AutoAWQ's, bit for bit, where that is right; integers out of range are clamped here, and
group size -1 and widths that are no multiple of 32 work.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from awq.utils.packing_utils import dequantize_gemm
from squawq.errors import ConfigError
from squawq.format.groupwise import LEVELS, PER_WORD, SYMMETRIC_ZERO, pack


class WQLinear_GEMM(nn.Module):  # noqa: N801 (AutoAWQ's name)
    """qweight int32 [in, out/8], qzeros int32 [groups, out/8]; scales float16 [groups, out], bias float16 [out].

    Raises ConfigError for other widths than 4 bits and for features that do not divide.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        w_bit: int,
        group_size: int,
        in_features: int,
        out_features: int,
        bias: bool,
        dev: str | torch.device | None = None,
        training: bool = False,
    ) -> None:
        super().__init__()
        if w_bit != 4:
            raise ConfigError(f"w_bit is {w_bit!r}; choose 4")
        self.in_features, self.out_features, self.w_bit = in_features, out_features, w_bit
        self.group_size = in_features if group_size == -1 else group_size
        self.training = training
        if self.group_size < 1 or in_features % self.group_size:
            raise ConfigError(f"in_features {in_features} is not a multiple of group size {group_size}")
        if out_features % PER_WORD:
            raise ConfigError(f"out_features {out_features} is not a multiple of {PER_WORD}")
        groups, words = in_features // self.group_size, out_features // PER_WORD
        self.register_buffer("qweight", torch.zeros(in_features, words, dtype=torch.int32, device=dev))
        self.register_buffer("qzeros", torch.zeros(groups, words, dtype=torch.int32, device=dev))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16, device=dev))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float16, device=dev) if bias else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        w_bit: int,
        group_size: int,
        init_only: bool = False,
        scales: Tensor | None = None,
        zeros: Tensor | None = None,
    ) -> WQLinear_GEMM:
        """Pack a linear with scales and zeros [groups, out]; `init_only` makes an empty one to load into.

        zeros None: symmetric around 8; others are rounded and clamped to 0 to 15. Raises ConfigError without scales, or
        where their shapes do not fit.
        """
        bias = linear.bias
        made = cls(w_bit, group_size, linear.in_features, linear.out_features, bias is not None, linear.weight.device)
        if init_only:
            return made
        shape = tuple(made.scales.shape)
        if scales is None or tuple(scales.shape) != shape or (zeros is not None and tuple(zeros.shape) != shape):
            given = [None if t is None else list(t.shape) for t in (scales, zeros)]
            raise ConfigError(
                f"scales and zeros are {given[0]} and {given[1]}; both must be [groups, out] {list(shape)}"
            )
        zeros = torch.full_like(scales, SYMMETRIC_ZERO) if zeros is None else zeros.round().clamp(0, LEVELS)
        offsets = zeros * scales
        made.scales = scales.clone().half()
        grouped = linear.weight.detach().T.reshape(shape[0], made.group_size, -1)
        integers = ((grouped + offsets[:, None]) / made.scales[:, None]).round().clamp(0, LEVELS)
        made.qweight = pack(integers.to(torch.int32).flatten(0, 1))
        made.qzeros = pack(zeros.to(torch.int32))
        if bias is not None:
            made.bias = bias.detach().clone().half()
        return made

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out] in x's own dtype."""
        weight = dequantize_gemm(self.qweight, self.qzeros, self.scales, self.w_bit, self.group_size)
        out = x @ weight.to(x.dtype)
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"w_bit={self.w_bit}, group_size={self.group_size}"
        )
