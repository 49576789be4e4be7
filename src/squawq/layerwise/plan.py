"""Plans what happens to the linears of a layer: which are quantized, and how AWQ scales fold into the weights.

Lin et al., AWQ, arXiv 2306.00978: Q(W s) (x / s), where 1 / s is folded into the operation that computes x. Without Q
the layer's function stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from squawq.families import Family, ScalingGroup, expert_of
from squawq.format.groupwise import PER_WORD
from squawq.layerwise.tensor_names import cast
from squawq.quant_config import QuantConfig

EXACT = ("correction_bias", "expert_bias")  # of routers: rounding could change the choice of experts
GATE, PER_LAYER = "a router or gate", "part of per-layer inputs"


class LayerPlan:
    """Which linears of a layer are quantized (`converted`), and why the others are `kept` in 16 bits.

    Linears of a module that share an input stay in 16 bits together, and so do all experts of a layer: engines fuse
    them and refuse a mixture. `shapes` has (out_features, in_features) by linear, `prefix` is the layer's full name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], family: Family, config: QuantConfig, prefix: str) -> None:
        self.shapes, self.family, self.config, self.prefix = shapes, family, config, prefix
        self.kept: dict[str, str] = {}
        groups = family.layer_groups(list(shapes))
        together: dict[object, list[str]] = {}
        for place, group in enumerate(groups):
            for name in group.linears:
                together.setdefault(_fused_with(place, name), []).append(name)
        for names in together.values():
            reasons = {n: r for n in names if (r := self._kept_reason(n, *shapes[n])) is not None}
            for name in names if reasons else ():
                first = next(iter(reasons))
                self.kept[name] = reasons.get(name, f"shares its input with {first}, which stays in 16 bits")
        self.converted = [name for group in groups for name in group.linears if name not in self.kept]
        gates = [name for group in groups for name in group.unquantized_consumers]
        for name in (*gates, *(name for name in family.routers if name in shapes)):
            self.kept[name] = PER_LAYER if name.startswith("per_layer") else GATE

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the layer's tensors that are not quantized."""
        return getattr(torch, self.config.dtype)  # type: ignore[no-any-return]

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the layer that is not quantized, converted to its dtype on disk."""
        return as_stored(tensor, self.dtype, f"{self.prefix}.{name}")

    def _kept_reason(self, name: str, out_features: int, in_features: int) -> str | None:
        if self.config.skips(f"{self.prefix}.{name}"):
            return "listed in modules_to_not_convert"
        if in_features % self.config.group_of(in_features):
            return f"in_features {in_features} is not a multiple of group size {self.config.group_size}"
        if out_features % PER_WORD:
            return f"out_features {out_features} is not a multiple of {PER_WORD}"
        return None


def as_stored(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor that is not quantized, converted to its dtype on disk: routers' biases (EXACT) keep theirs."""
    return tensor if name.endswith(EXACT) else cast(tensor, dtype, name)


def _fused_with(group: int, linear: str) -> object:
    """A key, equal for linears that engines fuse, such as q_proj, k_proj and v_proj."""
    expert = expert_of(linear)
    return expert.rpartition(".")[0] if expert else (group, linear.rpartition(".")[0])


@dataclass
class Folding:
    """How AWQ scales change a layer's weights; all tensors are float32."""

    columns: dict[str, Tensor] = field(default_factory=dict)  # [in] by linear: multiply its input channels
    rows: dict[str, Tensor] = field(default_factory=dict)  # [out] by linear: divide its output channels and bias
    norms: dict[str, Tensor] = field(default_factory=dict)  # [hidden] by parameter: replace it

    def into_norm(
        self,
        group: ScalingGroup,
        weight: Tensor,
        bias: Tensor | None,
        scales: Tensor,
        dtype: torch.dtype,
        offset: float,
    ) -> None:
        """Divide the norm before the group by `scales` [hidden]; multiply the columns of all modules that read it."""
        self.norms[f"{group.previous}.weight"], scales = norm_scales(weight, scales, dtype, offset)
        if bias is not None:
            self.norms[f"{group.previous}.bias"] = bias / scales
        self._into_columns(group, scales)

    def into_linear(self, group: ScalingGroup, out_features: int, scales: Tensor) -> None:
        """Divide the last rows of the linear before the group by `scales` [in]: in a gate_up_proj, up is last."""
        rows = torch.ones(out_features, device=scales.device)
        rows[-len(scales) :] = scales
        self.rows[group.previous] = rows
        self._into_columns(group, scales)

    def _into_columns(self, group: ScalingGroup, scales: Tensor) -> None:
        for name in (*group.linears, *group.unquantized_consumers):
            self.columns[name] = scales

    def to(self, device: str) -> Folding:
        """A copy with its tensors on `device`."""
        kinds = ({n: t.to(device) for n, t in kind.items()} for kind in (self.columns, self.rows, self.norms))
        return Folding(*kinds)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """Fold the scales into a float32 tensor of the layer, by its name in the layer; returns the result."""
        if name in self.norms:
            return self.norms[name].clone()
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in self.columns:
            tensor = tensor * self.columns[module]
        if module in self.rows:
            tensor = tensor / (self.rows[module][:, None] if kind == "weight" else self.rows[module])
        return tensor

    def original(self, module: str, rows: Tensor, part: slice) -> Tensor:
        """Undo the folding: rows `part` of a linear's weight, float32 [rows, in], from these rows after folding."""
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
        dtype: In which the norm is stored.
        offset: 1.0 for norms such as Gemma's.

    Returns:
        Folded weight and realized scales, float32 [features]: `norm` and 1 where folding gives 0 or no finite value.
    """
    factor = norm + offset
    folded = (factor / scales - offset).to(dtype).float()
    usable = (folded + offset != 0) & torch.isfinite(folded)
    return torch.where(usable, folded, norm), torch.where(usable, factor / (folded + offset), torch.ones_like(scales))
