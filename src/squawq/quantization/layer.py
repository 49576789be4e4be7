"""Quantizes one decoder layer: statistics, scales, ranges, integers, and the choice against plain rounding.

Peak memory above the layer itself (float32): the Gram matrices of its inputs, the integers, and one linear's copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from squawq.errors import CheckpointError
from squawq.families import ScalingGroup
from squawq.format.groupwise import GroupwiseTensor, fake_quantize, quantize
from squawq.format.packing import to_gemm
from squawq.quantization.blocks import Block
from squawq.quantization.fold import norm_scales
from squawq.quantization.plan import LayerPlan
from squawq.quantization.search import (
    ScaleCandidate,
    best_scales,
    clip_limits,
    gram_loss,
    sampled_rows,
    scale_candidates,
    weight_importance,
)
from squawq.quantization.statistics import InputStatistics, all_finite

SAMPLED_TOKENS = 2048  # tokens on which the inspected modules and the whole layer are judged


@dataclass
class LayerResult:
    """The layer's tensors as they go to disk (names relative to it) and its row of the report."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


@dataclass
class _Chosen:
    """What the search decided: per linear the integers, and the column and row factors that its weight was given."""

    integers: dict[str, GroupwiseTensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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
        self.kept, self.converted = plan.kept, plan.converted
        self.dtype = getattr(torch, plan.config.dtype)

    @torch.no_grad()
    def round(self) -> LayerResult:
        """Plain rounding to nearest; needs no calibration."""
        record = self._record(_Chosen(), {}, kept="rtn", before=None, after=None)
        return LayerResult(self._tensors(_Chosen()), record)

    @torch.no_grad()
    def search(self, states: Tensor) -> tuple[LayerResult, Tensor]:
        """AWQ on hidden states [blocks, tokens, hidden], which become the unquantized layer's output, also returned."""
        statistics = {
            g.linears[0]: InputStatistics(self.block.weight(g.linears[0]).shape[1], str(states.device))
            for g in self.family.groups
        }
        count = max(1, min(len(states), SAMPLED_TOKENS // states.shape[1]))
        picked = torch.linspace(0, len(states) - 1, count).round().long()
        sample = states[picked]
        with self.block.watching({name: s.update for name, s in statistics.items()}):
            output = self.block.run(states, in_place=True)
        wanted = output[picked]
        chosen = self._choose(statistics, sample)
        losses = self._linear_losses(chosen, statistics)
        statistics.clear()  # the Gram matrices are large
        self._apply(chosen)
        after = _mean_square(self.block.run(sample), wanted)
        self.block.reload()
        tensors = self._tensors(chosen)
        self._round_in_place()
        before = _mean_square(self.block.run(sample), wanted)
        kept = "awq" if after <= before else "rtn"  # also false when `after` is not a number
        if kept == "rtn":
            self.block.reload()
            tensors = self._tensors(_Chosen())
            chosen.notes.append("the search made this layer worse; plain rounding is kept")
        record = self._record(chosen, losses, kept, before, after if kept == "awq" else before)
        return LayerResult(tensors, record), output

    def _choose(self, statistics: Mapping[str, InputStatistics], sample: Tensor) -> _Chosen:
        chosen = _Chosen()
        inputs = self._inspected_inputs(sample)
        for group in self.family.groups:
            stats = statistics[group.linears[0]]
            if stats.dropped:
                chosen.notes.append(f"{group.linears[0]}: {stats.dropped} inputs were not finite and are left out")
            if not stats.has_signal:
                chosen.notes.append(f"{group.linears[0]}: no calibration signal; rounded to nearest")
            elif dead := int((stats.absolute == 0).sum()):
                chosen.notes.append(f"{group.linears[0]}: {dead} input channels without signal keep scale 1")
            self._choose_scales(group, stats, inputs.get(group.inspect), chosen)
        for group in self.family.groups:
            stats = statistics[group.linears[0]]
            for name in group.linears:
                if name in self.converted:
                    chosen.integers[name] = self._integers(name, stats, chosen)
        return chosen

    def _inspected_inputs(self, sample: Tensor) -> dict[str, Tensor]:
        """Inputs of the modules on whose output loss is taken, for the sampled blocks."""
        seen: dict[str, list[Tensor]] = {g.inspect: [] for g in self.family.groups if g.inspect}
        with self.block.watching({name: pieces.append for name, pieces in seen.items()}):
            self.block.run(sample)
        return {name: torch.cat(pieces) for name, pieces in seen.items()}

    def _choose_scales(
        self, group: ScalingGroup, stats: InputStatistics, inputs: Tensor | None, chosen: _Chosen
    ) -> None:
        names = [n for n in group.linears if n in self.converted]
        previous = self.block.weight(group.previous)
        fits = previous.dim() == 1 or previous.shape[0] == stats.gram.shape[0]
        if group.square:
            fits = previous.shape == self.block.weight(group.linears[0]).shape
        if not names or not fits or not stats.has_signal:
            return
        parameters = [self.block.parameter(n) for n in names]
        weights = [parameter.data for parameter in parameters]
        size = self.config.group_of(weights[0].shape[1])
        candidates = scale_candidates(stats.mean_absolute, weight_importance(weights, size), self.config.n_grid)
        if not self.config.duo_scaling:
            candidates = [c for c in candidates if c.formula != "xw"]
        wanted = None if inputs is None else self.block.inspect(group.inspect, inputs)

        def inspect(candidate: ScaleCandidate) -> float:
            assert inputs is not None
            assert wanted is not None
            for parameter, weight in zip(parameters, weights, strict=True):
                rounded = fake_quantize(weight * candidate.scales, size, self.config.zero_point)
                parameter.data = rounded.div_(candidate.scales)
            loss = _mean_square(self.block.inspect(group.inspect, inputs), wanted)
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.data = weight
            return loss

        best = best_scales(
            candidates, weights, stats.gram, size, self.config.zero_point, None if inputs is None else inspect
        )
        chosen.groups.append({"linears": list(group.linears), "formula": best.formula, "ratio": best.ratio})
        if best.formula == "identity":
            return
        scales = best.scales
        if previous.dim() == 1:
            chosen.norms[group.previous], scales = norm_scales(previous, scales, self.dtype)
        else:
            chosen.rows[group.previous] = scales
        for name in group.linears:
            chosen.columns[name] = scales

    def _scaled(self, name: str, chosen: _Chosen) -> Tensor:
        """A linear's weight with its columns multiplied and its rows divided as chosen: float32 [out, in]."""
        weight = self.block.weight(name)
        if name in chosen.columns:
            weight = weight * chosen.columns[name]
        return weight / chosen.rows[name][:, None] if name in chosen.rows else weight

    def _integers(self, name: str, stats: InputStatistics, chosen: _Chosen) -> GroupwiseTensor:
        weight = self._scaled(name, chosen)
        size = self.config.group_of(weight.shape[1])
        limits = None
        if self.config.clip and stats.has_signal and not name.endswith(self.family.never_clip):
            limits = clip_limits(weight, stats.gram_blocks(size, chosen.columns.get(name)), self.config.zero_point)
        return quantize(weight, size, self.config.zero_point, limits)

    def _linear_losses(
        self, chosen: _Chosen, statistics: Mapping[str, InputStatistics]
    ) -> dict[str, tuple[float, float]]:
        """Per linear: mean squared output error by plain rounding and by what was chosen, on sampled rows."""
        losses = {}
        for group in self.family.groups:
            stats = statistics[group.linears[0]]
            for name in (n for n in group.linears if n in self.converted and stats.rows):
                weight = self.block.weight(name)
                part = sampled_rows(weight)
                rows = weight[part]
                rounded = fake_quantize(rows, self.config.group_of(rows.shape[1]), self.config.zero_point)
                found = chosen.integers[name].rows(part).dequantize()
                if name in chosen.rows:
                    found *= chosen.rows[name][part, None]
                if name in chosen.columns:
                    found /= chosen.columns[name]
                scale = 1 / (stats.rows * len(rows))
                losses[name] = (
                    gram_loss(rounded - rows, stats.gram) * scale,
                    gram_loss(found - rows, stats.gram) * scale,
                )
        return losses

    def _apply(self, chosen: _Chosen) -> None:
        """Put the chosen weights into the layer, dequantized, to judge them as they will be read back."""
        for name in self.family.linears:
            dense = self._scaled(name, chosen) if name in self.kept else chosen.integers[name].dequantize()
            self.block.parameter(name).data = dense
            bias = self.block.module.get_submodule(name).bias
            if name in chosen.rows and isinstance(bias, Tensor):
                bias.data = bias.data / chosen.rows[name]
        for name, norm in chosen.norms.items():
            self.block.parameter(name).data = norm

    def _round_in_place(self) -> None:
        for name in self.converted:
            weight = self.block.weight(name)
            self.block.parameter(name).data = fake_quantize(
                weight, self.config.group_of(weight.shape[1]), self.config.zero_point
            )

    def _tensors(self, chosen: _Chosen) -> dict[str, Tensor]:
        """The tensors to write; linears without chosen integers are rounded to nearest. Needs the original weights."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.block.state().items():
            module = name.rpartition(".")[0]
            full = f"{self.prefix}.{name}"
            if module in chosen.norms:
                tensor = chosen.norms[module]
            elif name.endswith(".bias") and module in chosen.rows:
                tensor = tensor / chosen.rows[module]
            elif module in self.converted and name.endswith(".weight"):
                size = self.config.group_of(tensor.shape[1])
                integers = chosen.integers.get(module) or quantize(tensor, size, self.config.zero_point)
                packed = to_gemm(integers)
                if not all_finite(packed["scales"]):
                    raise CheckpointError(
                        f"tensor {full!r} holds values too large for float16 scales; use --skip {module}"
                    )
                tensors |= {f"{module}.{kind}": t for kind, t in packed.items()}
                continue
            elif module in self.kept:
                tensor = self._scaled(module, chosen) if name.endswith(".weight") else tensor
            tensors[name] = cast(tensor, self.dtype, full)
        return tensors

    def _record(
        self,
        chosen: _Chosen,
        losses: Mapping[str, tuple[float, float]],
        kept: str,
        before: float | None,
        after: float | None,
    ) -> dict[str, Any]:
        linears = []
        for name in self.family.linears:
            out_features, in_features = self.block.weight(name).shape
            row: dict[str, Any] = {"name": name, "out_features": out_features, "in_features": in_features}
            if name in self.kept:
                row["kept_in_16_bits"] = self.kept[name]
            elif name in losses:
                rounded, searched = losses[name]
                row |= {"loss_rounded": _number(rounded), "loss": _number(searched if kept == "awq" else rounded)}
            linears.append(row)
        return {
            "name": self.prefix,
            "method": kept,
            "loss_rounded": _number(before),
            "loss": _number(after),
            "scales": chosen.groups if kept == "awq" else [],
            "linears": linears,
            "notes": chosen.notes,
        }


def _mean_square(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean(dtype=torch.float64))


def _number(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and abs(value) < float("inf") else None
