"""Moves scales out of a linear's input into the operation before it, so that the layer's function stays the same."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from squawq.families import ScalingGroup


@dataclass
class Folding:
    """What scales do to a layer's tensors: columns of linears are multiplied, rows and biases of those before divided,
    norms replaced (by the names of their parameters)."""

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
        """The norm before takes the inverse of `scales` [features]; everything that reads it takes the scales."""
        self.norms[f"{group.previous}.weight"], scales = norm_scales(weight, scales, dtype, offset)
        if bias is not None:
            self.norms[f"{group.previous}.bias"] = bias / scales
        self._into_columns(group, scales)

    def into_linear(self, group: ScalingGroup, out_features: int, scales: Tensor) -> None:
        """The last rows of the linear before take the inverse; where it makes gate and up in one, up is last."""
        rows = torch.ones(out_features, device=scales.device)
        rows[-len(scales) :] = scales
        self.rows[group.previous] = rows
        self._into_columns(group, scales)

    def _into_columns(self, group: ScalingGroup, scales: Tensor) -> None:
        for name in (*group.linears, *group.readers):
            self.columns[name] = scales

    def to(self, device: str) -> Folding:
        """The same with its tensors there."""
        kinds = ({n: t.to(device) for n, t in kind.items()} for kind in (self.columns, self.rows, self.norms))
        return Folding(*kinds)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the layer after folding, by its name in it: float32."""
        if name in self.norms:
            return self.norms[name].clone()
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in self.columns:
            tensor = tensor * self.columns[module]
        if module in self.rows:
            tensor = tensor / (self.rows[module][:, None] if kind == "weight" else self.rows[module])
        return tensor

    def original(self, module: str, rows: Tensor, part: slice) -> Tensor:
        """Rows `part` of a linear's weight before folding, from those after it."""
        if module in self.rows:
            rows = rows * self.rows[module][part, None]
        return rows / self.columns[module] if module in self.columns else rows


def norm_scales(norm: Tensor, scales: Tensor, dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """A norm's weight divided by `scales` and rounded to `dtype`, and the scales that this rounded weight stands for.

    norm, scales float32 [features]; both results float32. The norm multiplies by its weight plus `offset`. Multiplying
    the linear's columns by the second result undoes the rounding of the first exactly, so folding costs nothing even
    in bfloat16.
    """
    whole = norm + offset
    folded = (whole / scales - offset).to(dtype).float()
    usable = (folded + offset != 0) & torch.isfinite(folded)
    return torch.where(usable, folded, norm), torch.where(usable, whole / (folded + offset), torch.ones_like(scales))
