"""Quantizes one decoder layer: scales, ranges, integers, and the choice against plain rounding.

Peak memory above the layer itself (float32): the Gram matrices of its inputs, the packed integers, and what rounding
one linear takes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from squawq.errors import CheckpointError
from squawq.families import ScalingGroup, expert_of
from squawq.format.groupwise import fake_quantize, quantize
from squawq.format.packing import to_gemm
from squawq.quantization.blocks import EXACT, Block
from squawq.quantization.fold import Folding
from squawq.quantization.inputs import LayerInputs
from squawq.quantization.linear import LinearRounder
from squawq.quantization.plan import LayerPlan
from squawq.quantization.records import GroupRecord, LayerRecord, LinearRecord, clip_quantiles, quantiles
from squawq.quantization.search import (
    ScaleCandidate,
    best_scales,
    rows_at_once,
    sampled_rows,
    scale_candidates,
    weight_importance,
)
from squawq.quantization.statistics import InputStatistics, all_finite, relative_error

SAMPLED_LINEARS = 16  # of a group, on which scales are judged: those of many experts are much alike
Packed = dict[str, Tensor]  # a linear's qweight, scales and qzeros


@dataclass
class LayerResult:
    """The layer's tensors as they go to disk (names relative to it) and its row of the report."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


@dataclass
class Chosen:
    """What has been decided of a layer so far, and what the report says of it. integers: packed, by linear. losses:
    mean squared output error by plain rounding and by the integers."""

    folding: Folding = field(default_factory=Folding)
    integers: dict[str, Packed] = field(default_factory=dict)
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
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
    """One layer's run through the algorithm, by its plan: scales, whose folding changes the layer; then the integers of
    one linear after another; then `finish`."""

    def __init__(self, block: Block, plan: LayerPlan) -> None:
        self.block, self.family, self.config, self.prefix = block, plan.family, plan.config, plan.prefix
        self.kept, self.converted, self.groups = plan.kept, plan.converted, block.groups
        self.dtype = getattr(torch, plan.config.dtype)

    @torch.no_grad()
    def round(self) -> LayerResult:
        """Plain rounding to nearest; needs no calibration."""
        return LayerResult(self._tensors(Chosen()), self._record(Chosen(), kept="rtn", before=None, after=None))

    @torch.no_grad()
    def choose_scales(self, inputs: LayerInputs, lasting: Collection[str]) -> Chosen:
        """Scales for every group first: a group's scales change the rows of the linear before it. lasting: modules
        whose inputs' statistics, which are large, are needed for more."""
        chosen = Chosen(notes=list(inputs.notes()), tokens=inputs.tokens)
        for group in self.groups:
            stats, names = inputs.of_group(group), [n for n in group.linears if n in self.converted]
            if names and stats.has_signal and self.takes_scales(group):
                best = self._best_scales(group, names[:: -(-len(names) // SAMPLED_LINEARS)], stats, inputs)
                chosen.groups.append(GroupRecord(group.linears, best.formula, best.ratio, quantiles(best.scales)))
                if best.formula != "identity":
                    self.fold(group, best.scales, chosen.folding)
            if group.watched not in lasting:
                inputs.statistics.pop(group.watched, None)
        return chosen

    def _best_scales(
        self, group: ScalingGroup, names: list[str], stats: InputStatistics, inputs: LayerInputs
    ) -> ScaleCandidate:
        weights = [self.block.weight(name) for name in names]
        size, zero_point = self.config.group_of(weights[0].shape[1]), self.config.zero_point
        candidates = scale_candidates(stats.mean_absolute, weight_importance(weights, size), self.config.scale_steps)
        if not self.config.duo_scaling:
            candidates = [c for c in candidates if c.formula != "xw"]
        if group.inspect is None or self.config.error_feedback:  # a module would judge another rounding than will be
            return best_scales(candidates, weights, stats.loss, size, zero_point)
        module, given = group.inspect, inputs.whole(group.inspect)
        wanted = self.block.inspect(module, given)

        def inspect(candidate: ScaleCandidate) -> float:
            for name in names:
                self._round_in_place(name, candidate.scales)
            loss = _mean_square(self.block.inspect(module, given), wanted)
            for name in names:
                self.block.restore(f"{name}.weight")  # a second copy of the weights would be large
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

    @torch.no_grad()
    def fold_in(self, folding: Folding) -> None:
        """Change the layer as its scales ask for; what stays in 16 bits is henceforth what will be read back."""
        self.block.fold(folding)
        for name, tensor in self.block.state().items():
            module, _, kind = name.rpartition(".")
            if not (kind == "weight" and module in self.converted):
                tensor.copy_(self._stored(name, tensor))

    @torch.no_grad()
    def choose_integers(self, linears: Iterable[str], rounder: LinearRounder, chosen: Chosen) -> dict[str, Packed]:
        """Integers, packed, for linears of the folded layer that share an input; their weights are given up for it."""
        if rounder.drift is not None:
            chosen.notes += rounder.stats.notes(f"{rounder.drift.stage.watched}, behind quantized layers")
        return {name: self._integers(name, rounder, chosen) for name in linears}

    def _integers(self, name: str, rounder: LinearRounder, chosen: Chosen) -> Packed:
        weight, folding, stats = self.block.weight(name), chosen.folding, rounder.stats
        part = sampled_rows(weight)
        original = folding.original(name, weight[part].clone(), part)
        clip = self.config.clip and not (self.config.method == "awq" and name.endswith(self.family.never_clip))
        integers, limits = rounder.choose(weight, clip)
        if limits is not None:
            chosen.clips[name] = clip_quantiles(weight, limits)
        if stats.rows:
            rounded = fake_quantize(original, self.config.group_of(weight.shape[1]), self.config.zero_point) - original
            found = integers.rows(part).dequantize() - weight[part]
            if name in folding.columns:
                rounded *= folding.columns[name]
            if name in folding.rows:
                found *= folding.rows[name][part, None]
            scale = 1 / (stats.rows * len(original))
            chosen.losses[name] = stats.loss(rounded) * scale, stats.loss(found) * scale
        chosen.integers[name] = {kind: tensor.cpu() for kind, tensor in to_gemm(integers).items()}
        return chosen.integers[name]

    @torch.no_grad()
    def finish(self, chosen: Chosen, before: Tensor, wanted: Tensor) -> LayerResult:
        """What to write: what was chosen, or plain rounding where that is better for these hidden states [blocks,
        tokens, hidden] and the output wanted for them. The layer holds what was chosen."""
        found = self.block.run(before)
        after, error = _mean_square(found, wanted), relative_error(found, wanted)
        tensors = self._tensors(chosen)
        self.block.reload()
        for name in self.converted:
            self._round_in_place(name)
        found = self.block.run(before)
        rounded, rounded_error = _mean_square(found, wanted), relative_error(found, wanted)
        if after <= rounded:  # also false when `after` is not a number
            return LayerResult(
                tensors, self._record(chosen, self.config.method, rounded, after, (rounded_error, error))
            )
        self.block.reload()
        chosen.notes.append("the search made this layer worse; plain rounding is kept")
        return LayerResult(self._tensors(Chosen()), self._record(chosen, "rtn", rounded, rounded, (rounded_error,) * 2))

    def _round_in_place(self, name: str, scales: Tensor | None = None) -> None:
        """To nearest, as it is read back; with scales, multiplied by them before and divided after."""
        weight = self.block.weight(name)
        size, zero_point = self.config.group_of(weight.shape[1]), self.config.zero_point
        for rows in torch.split(weight, rows_at_once(weight)):
            if scales is None:
                rows.copy_(fake_quantize(rows, size, zero_point))
            else:
                rows.copy_(fake_quantize(rows * scales, size, zero_point).div_(scales))

    def _tensors(self, chosen: Chosen) -> dict[str, Tensor]:
        """The tensors to write; linears without chosen integers are rounded to nearest."""
        tensors: dict[str, Tensor] = {}
        converted = set(self.converted)
        for name, tensor in self.block.state().items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and module in converted:
                tensors |= self._packed(module, tensor, chosen)
            else:
                tensors[name] = self._stored(name, tensor)
        return tensors

    def _stored(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the layer that is not quantized, as it goes to disk."""
        return tensor if name.endswith(EXACT) else cast(tensor, self.dtype, f"{self.prefix}.{name}")

    def _packed(self, linear: str, weight: Tensor, chosen: Chosen) -> dict[str, Tensor]:
        packed = chosen.integers.get(linear)
        if packed is None:
            packed = to_gemm(quantize(weight, self.config.group_of(weight.shape[1]), self.config.zero_point))
        if not all_finite(packed["scales"]):
            full = f"{self.prefix}.{linear}.weight"
            raise CheckpointError(f"tensor {full!r} holds values too large for float16 scales; use --skip {linear}")
        return {f"{linear}.{kind}": tensor for kind, tensor in packed.items()}

    def _record(
        self,
        chosen: Chosen,
        kept: str,
        before: float | None,
        after: float | None,
        relative: tuple[float | None, float | None] = (None, None),
    ) -> dict[str, Any]:
        searched, linears = kept != "rtn", []
        for name in (name for group in self.groups for name in (*group.linears, *group.readers)):
            out_features, in_features = self.block.weight(name).shape
            rounded, loss = chosen.losses.get(name, (None, None))
            linears.append(
                LinearRecord(
                    name,
                    out_features,
                    in_features,
                    tokens=chosen.tokens.get(expert_of(name) or ""),
                    kept_in_16_bits=self.kept.get(name),
                    loss_rounded=rounded,
                    loss=loss if searched else rounded,
                    clip=chosen.clips.get(name) if searched else None,
                )
            )
        groups = chosen.groups if searched else []
        return LayerRecord(self.prefix, kept, before, after, groups, linears, chosen.notes, *relative).to_dict()


def _mean_square(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean(-1).cpu().mean(dtype=torch.float64))
