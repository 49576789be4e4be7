"""Folds AWQ scales into the operation before a linear, so that the layer's function stays the same.

Lin et al., AWQ, arXiv 2306.00978: Q(W s) (x / s), where the operation that makes x absorbs 1 / s.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from squawq.families import ScalingGroup


@dataclass
class Folding:
    """Changes that scales make to a layer's weights.

    Attributes:
        columns: Multiply the input channels of a linear, float32 [in] by linear.
        rows: Divide the output channels and bias of a linear, float32 [out] by linear.
        norms: Replace a norm's parameters, float32 [hidden] by parameter name.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)

    def into_norm(
        self,
        group: ScalingGroup,
        weight: Tensor,
        bias: Tensor | None,
        scales: Tensor,
        dtype: torch.dtype,
        offset: float,
    ) -> None:
        """Divide the norm before the group by `scales` [features]; multiply the columns of all that reads it."""
        self.norms[f"{group.previous}.weight"], scales = norm_scales(weight, scales, dtype, offset)
        if bias is not None:
            self.norms[f"{group.previous}.bias"] = bias / scales
        self._into_columns(group, scales)

    def into_linear(self, group: ScalingGroup, out_features: int, scales: Tensor) -> None:
        """Divide the last rows of the linear before: up is last where it makes gate and up in one."""
        rows = torch.ones(out_features, device=scales.device)
        rows[-len(scales) :] = scales
        self.rows[group.previous] = rows
        self._into_columns(group, scales)

    def _into_columns(self, group: ScalingGroup, scales: Tensor) -> None:
        for name in (*group.linears, *group.unquantized_consumers):
            self.columns[name] = scales

    def to(self, device: str) -> Folding:
        """The same with its tensors there."""
        kinds = ({n: t.to(device) for n, t in kind.items()} for kind in (self.columns, self.rows, self.norms))
        return Folding(*kinds)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the layer after folding, float32, by its name in the layer."""
        if name in self.norms:
            return self.norms[name].clone()
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in self.columns:
            tensor = tensor * self.columns[module]
        if module in self.rows:
            tensor = tensor / (self.rows[module][:, None] if kind == "weight" else self.rows[module])
        return tensor

    def original(self, module: str, rows: Tensor, part: slice) -> Tensor:
        """Rows `part` of a linear's weight [out, in] before folding, from the same rows after folding."""
        if module in self.rows:
            rows = rows * self.rows[module][part, None]
        return rows / self.columns[module] if module in self.columns else rows


def norm_scales(norm: Tensor, scales: Tensor, dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Divide a norm's weight by `scales`, rounded to `dtype`, and return the scales that the rounded weight realizes.

    Multiplying the linear's columns by the realized scales cancels the rounding exactly, so folding is lossless even in
    bfloat16.

    Args:
        norm: float32 [features]; the norm multiplies by `norm + offset`.
        scales: float32 [features].
        dtype: Of the norm in the result.
        offset: 1.0 for norms such as Gemma's.

    Returns:
        The folded weight and the realized scales, each float32 [features].
    """
    whole = norm + offset
    folded = (whole / scales - offset).to(dtype).float()
    usable = (folded + offset != 0) & torch.isfinite(folded)
    return torch.where(usable, folded, norm), torch.where(usable, whole / (folded + offset), torch.ones_like(scales))
