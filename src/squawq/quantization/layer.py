"""Quantizes one decoder layer: statistics, scales, ranges, integers, and the choice against plain rounding.

Peak memory above the layer itself (float32): the Gram matrices of its inputs, the integers, and one linear's copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from squawq.errors import CheckpointError
from squawq.families import ScalingGroup, expert_of
from squawq.format.groupwise import GroupwiseTensor, fake_quantize, quantize
from squawq.format.packing import to_gemm
from squawq.quantization.blocks import Block
from squawq.quantization.fold import Folding
from squawq.quantization.inputs import LayerInputs
from squawq.quantization.plan import LayerPlan
from squawq.quantization.records import GroupRecord, LayerRecord, LinearRecord, clip_quantiles, quantiles
from squawq.quantization.search import (
    ScaleCandidate,
    best_scales,
    clip_limits,
    sampled_rows,
    scale_candidates,
    weight_importance,
)
from squawq.quantization.statistics import InputStatistics, all_finite

SAMPLED_LINEARS = 16  # of a group, on which scales are judged: those of many experts are much alike
EXACT = ("correction_bias", "expert_bias")  # of routers: rounding them would change who is chosen


@dataclass
class LayerResult:
    """The layer's tensors as they go to disk (names relative to it) and its row of the report."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


@dataclass
class _Chosen:
    """What the search decided: what scales do to the layer's tensors, and the integers of each linear."""

    folding: Folding = field(default_factory=Folding)
    integers: dict[str, GroupwiseTensor] = field(default_factory=dict)
    clips: dict[str, list[float]] = field(default_factory=dict)
    groups: list[GroupRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tokens: Mapping[str, int] = field(default_factory=dict)


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """To the 16-bit dtype on disk. Raises CheckpointError where a finite value would become infinite."""
    result = tensor.to(dtype)
    if not all_finite(result):
        raise CheckpointError(f"tensor {name!r} holds values beyond {dtype}; use dtype bfloat16 (--dtype bfloat16)")
    return result


class LayerQuantizer:
    """One layer's run through the algorithm, by its plan."""

    def __init__(self, block: Block, plan: LayerPlan) -> None:
        self.block, self.family, self.config, self.prefix = block, plan.family, plan.config, plan.prefix
        self.kept, self.converted, self.groups = plan.kept, plan.converted, block.groups
        self.dtype = getattr(torch, plan.config.dtype)

    @torch.no_grad()
    def round(self) -> LayerResult:
        """Plain rounding to nearest; needs no calibration."""
        record = self._record(_Chosen(), {}, kept="rtn", before=None, after=None)
        return LayerResult(self._tensors(_Chosen()), record)

    @torch.no_grad()
    def search(self, inputs: LayerInputs) -> LayerResult:
        """AWQ by what was collected, which is given up on the way."""
        inputs.complete()
        chosen = self._choose(inputs)
        losses = self._linear_losses(chosen, inputs)
        inputs.clear()
        self.apply(chosen.folding, chosen.integers)
        after = _mean_square(self.block.run(inputs.before), inputs.after)
        self.block.reload()
        tensors = self._tensors(chosen)
        self._round_in_place()
        before = _mean_square(self.block.run(inputs.before), inputs.after)
        kept = "awq" if after <= before else "rtn"  # also false when `after` is not a number
        if kept == "rtn":
            self.block.reload()
            tensors = self._tensors(_Chosen())
            chosen.notes.append("the search made this layer worse; plain rounding is kept")
        record = self._record(chosen, losses, kept, before, after if kept == "awq" else before)
        return LayerResult(tensors, record)

    def _choose(self, inputs: LayerInputs) -> _Chosen:
        """Scales for every group first: a group's scales change the rows of the linear before it."""
        chosen = _Chosen(notes=list(inputs.notes()), tokens=inputs.tokens)
        for group in self.groups:
            self._choose_scales(group, inputs, chosen)
        for name in self.converted:
            chosen.integers[name] = self._integers(name, inputs.of(name), chosen)
        return chosen

    def _choose_scales(self, group: ScalingGroup, inputs: LayerInputs, chosen: _Chosen) -> None:
        stats = inputs.of_group(group)
        names = [n for n in group.linears if n in self.converted]
        if not names or not stats.has_signal or not self.takes_scales(group):
            return
        parameters = [self.block.parameter(n) for n in names[:: -(-len(names) // SAMPLED_LINEARS)]]
        best = self._best_scales(group, parameters, stats, inputs)
        chosen.groups.append(GroupRecord(group.linears, best.formula, best.ratio, quantiles(best.scales)))
        if best.formula != "identity":
            self.fold(group, best.scales, chosen.folding)

    def _best_scales(
        self, group: ScalingGroup, parameters: list[nn.Parameter], stats: InputStatistics, inputs: LayerInputs
    ) -> ScaleCandidate:
        weights = [parameter.data for parameter in parameters]
        size, zero_point = self.config.group_of(weights[0].shape[1]), self.config.zero_point
        candidates = scale_candidates(stats.mean_absolute, weight_importance(weights, size), self.config.n_grid)
        if not self.config.duo_scaling:
            candidates = [c for c in candidates if c.formula != "xw"]
        if group.inspect is None:
            return best_scales(candidates, weights, stats.loss, size, zero_point)
        module, given = group.inspect, inputs.whole(group.inspect)
        wanted = self.block.inspect(module, given)

        def inspect(candidate: ScaleCandidate) -> float:
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.data = fake_quantize(weight * candidate.scales, size, zero_point).div_(candidate.scales)
            loss = _mean_square(self.block.inspect(module, given), wanted)
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.data = weight
            return loss

        return best_scales(candidates, weights, stats.loss, size, zero_point, inspect)

    def takes_scales(self, group: ScalingGroup) -> bool:
        """Whether the op before a group can take the inverse of the group's scales."""
        if not group.previous or getattr(self.block.module.get_submodule(group.previous), "weight", None) is None:
            return False
        previous, linear = self.block.weight(group.previous), self.block.weight(group.linears[0])
        if group.square:
            return previous.shape == linear.shape
        return previous.shape[0] in (linear.shape[1], 2 * linear.shape[1])

    def fold(self, group: ScalingGroup, scales: Tensor, folding: Folding) -> None:
        """Note what scales [in_features] of a group do to the layer's tensors."""
        previous = self.block.module.get_submodule(group.previous)
        weight = self.block.weight(group.previous)
        if weight.dim() == 2:
            folding.into_linear(group, len(weight), scales)
        else:
            bias = getattr(previous, "bias", None)
            bias = bias.data if isinstance(bias, Tensor) else None
            folding.into_norm(group, weight, bias, scales, self.dtype, self.family.norm_offset)

    def _integers(self, name: str, stats: InputStatistics, chosen: _Chosen) -> GroupwiseTensor:
        folding = chosen.folding
        weight = folding.apply(f"{name}.weight", self.block.weight(name))
        size = self.config.group_of(weight.shape[1])
        limits = None
        if self.config.clip and stats.has_signal and not name.endswith(self.family.never_clip):
            limits = clip_limits(weight, stats.gram_blocks(size, folding.columns.get(name)), self.config.zero_point)
            chosen.clips[name] = clip_quantiles(weight, limits)
        return quantize(weight, size, self.config.zero_point, limits)

    def _linear_losses(self, chosen: _Chosen, inputs: LayerInputs) -> dict[str, tuple[float, float]]:
        """Per linear: mean squared output error by plain rounding and by what was chosen, on sampled rows."""
        losses, folding = {}, chosen.folding
        for name in self.converted:
            if (stats := inputs.of(name)).rows:
                weight = self.block.weight(name)
                part = sampled_rows(weight)
                rows = weight[part]
                rounded = fake_quantize(rows, self.config.group_of(rows.shape[1]), self.config.zero_point)
                found = chosen.integers[name].rows(part).dequantize()
                if name in folding.rows:
                    found *= folding.rows[name][part, None]
                if name in folding.columns:
                    found /= folding.columns[name]
                scale = 1 / (stats.rows * len(rows))
                losses[name] = (
                    stats.loss(rounded - rows) * scale,
                    stats.loss(found - rows) * scale,
                )
        return losses

    def apply(self, folding: Folding, integers: Mapping[str, GroupwiseTensor]) -> None:
        """Put what was chosen into the layer, dequantized, to judge it as it will be read back."""
        for name, parameter in self.block.module.named_parameters():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and module in integers:
                parameter.data = integers[module].dequantize()
            else:
                parameter.data = folding.apply(name, parameter.data)

    def _round_in_place(self) -> None:
        for name in self.converted:
            weight = self.block.weight(name)
            self.block.parameter(name).data = fake_quantize(
                weight, self.config.group_of(weight.shape[1]), self.config.zero_point
            )

    def _tensors(self, chosen: _Chosen) -> dict[str, Tensor]:
        """The tensors to write; linears without chosen integers are rounded to nearest. Needs the original weights."""
        tensors: dict[str, Tensor] = {}
        converted = set(self.converted)
        for name, tensor in self.block.state().items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and module in converted:
                tensors |= self._packed(module, tensor, chosen)
            elif name.endswith(EXACT):
                tensors[name] = tensor
            else:
                tensors[name] = cast(chosen.folding.apply(name, tensor), self.dtype, f"{self.prefix}.{name}")
        return tensors

    def _packed(self, linear: str, weight: Tensor, chosen: _Chosen) -> dict[str, Tensor]:
        size = self.config.group_of(weight.shape[1])
        packed = to_gemm(chosen.integers.get(linear) or quantize(weight, size, self.config.zero_point))
        if not all_finite(packed["scales"]):
            full = f"{self.prefix}.{linear}.weight"
            raise CheckpointError(f"tensor {full!r} holds values too large for float16 scales; use --skip {linear}")
        return {f"{linear}.{kind}": tensor for kind, tensor in packed.items()}

    def _record(
        self,
        chosen: _Chosen,
        losses: Mapping[str, tuple[float, float]],
        kept: str,
        before: float | None,
        after: float | None,
    ) -> dict[str, Any]:
        linears = []
        for name in (name for group in self.groups for name in (*group.linears, *group.readers)):
            out_features, in_features = self.block.weight(name).shape
            rounded, searched = losses.get(name, (None, None))
            linears.append(
                LinearRecord(
                    name,
                    out_features,
                    in_features,
                    tokens=chosen.tokens.get(expert_of(name) or ""),
                    kept_in_16_bits=self.kept.get(name),
                    loss_rounded=rounded,
                    loss=searched if kept == "awq" else rounded,
                    clip=chosen.clips.get(name) if kept == "awq" else None,
                )
            )
        groups = chosen.groups if kept == "awq" else []
        return LayerRecord(self.prefix, kept, before, after, groups, linears, chosen.notes).to_dict()


def _mean_square(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean(-1).cpu().mean(dtype=torch.float64))
