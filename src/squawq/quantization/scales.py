"""Chooses and folds the AWQ scales of one layer.

Lin et al., AWQ, arXiv 2306.00978; candidates and their loss on tensors alone are in `search`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from squawq.families import ScalingGroup
from squawq.format.groupwise import fake_quantize
from squawq.layerwise.blocks import Block
from squawq.layerwise.fold import Folding
from squawq.layerwise.plan import LayerPlan
from squawq.quantization.inputs import LayerInputs
from squawq.quantization.records import quantiles
from squawq.quantization.result import LayerQuantization, stored
from squawq.quantization.search import (
    ScaleCandidate,
    best_scales,
    rows_at_once,
    scale_candidates,
    weight_importance,
)
from squawq.quantization.statistics import InputStatistics, mean_square
from squawq.report.schema import ScaleRow

SAMPLED_LINEARS = 16  # of a group, on which scales are judged: those of many experts are much alike


@torch.no_grad()
def choose_scales(
    block: Block, plan: LayerPlan, inputs: LayerInputs, whole: Collection[str], chosen: LayerQuantization
) -> Folding:
    """Choose the scales of every group, before any linear is rounded: they also change the operation before the group.

    Args:
        block: The 16-bit layer; unchanged.
        plan: Which of its linears are quantized.
        inputs: Statistics of all ranks. Those of capture modules that are not in `whole` are dropped once used.
        whole: Capture modules whose statistics are needed later.
        chosen: Where the report's rows and notes go.

    Returns:
        What to fold into the layer, on the CPU.
    """
    samples = inputs.sample_modules(inspected=not plan.config.error_feedback)
    inputs.route_to_rare(samples)
    chosen.notes, chosen.tokens = list(inputs.notes()), inputs.tokens
    folding = Folding()
    for group in block.groups:
        stats, names = inputs.of_group(group), [n for n in group.linears if n in plan.converted]
        if names and stats.has_signal and takes_scales(block, group):
            sampled = names[:: -(-len(names) // SAMPLED_LINEARS)]
            best = _best_scales(block, plan, group, sampled, stats, samples)
            spread, linears = quantiles(best.scales), list(group.linears)
            chosen.scales.append(ScaleRow(linears=linears, formula=best.formula, ratio=best.ratio, quantiles=spread))
            if best.formula != "identity":
                fold_group(block, plan, group, best.scales, folding)
        if group.capture_module not in whole:
            inputs.statistics.pop(group.capture_module, None)
    return folding.to("cpu")


def _best_scales(
    block: Block,
    plan: LayerPlan,
    group: ScalingGroup,
    names: Sequence[str],
    stats: InputStatistics,
    samples: Mapping[str, Tensor],
) -> ScaleCandidate:
    config, weights = plan.config, [block.weight(name) for name in names]
    size, zero_point = config.group_of(weights[0].shape[1]), config.zero_point
    candidates = scale_candidates(stats.mean_absolute, weight_importance(weights, size), config.scale_steps)
    if not config.duo_scaling:
        candidates = [c for c in candidates if c.formula != "xw"]
    if group.inspect is None or config.error_feedback:  # the module would judge plain rounding, which is not what comes
        return best_scales(candidates, weights, stats.loss, size, zero_point)
    module, given = group.inspect, samples[group.inspect]
    wanted = block.inspect(module, given)

    def inspect(candidate: ScaleCandidate) -> float:
        for name in names:
            round_in_place(block, plan, name, candidate.scales)
        loss = mean_square(block.inspect(module, given), wanted)
        for name in names:
            block.restore(f"{name}.weight")  # a second copy of the weights would be large
        return loss

    return best_scales(candidates, weights, stats.loss, size, zero_point, inspect)


def takes_scales(block: Block, group: ScalingGroup) -> bool:
    """Whether the operation before a group can absorb the inverse of the group's scales."""
    if not group.previous or getattr(block.module.get_submodule(group.previous), "weight", None) is None:
        return False
    previous, linear = block.weight(group.previous), block.weight(group.linears[0])
    if group.square:
        return previous.shape == linear.shape
    return previous.shape[0] in (linear.shape[1], 2 * linear.shape[1])


def fold_group(block: Block, plan: LayerPlan, group: ScalingGroup, scales: Tensor, folding: Folding) -> None:
    """Add to `folding` what scales [in_features] of a group do to the layer's weights."""
    weight = block.weight(group.previous)
    if weight.dim() == 2:
        folding.into_linear(group, len(weight), scales)
    else:
        bias = getattr(block.module.get_submodule(group.previous), "bias", None)
        bias = bias.data if isinstance(bias, Tensor) else None
        dtype = getattr(torch, plan.config.dtype)
        folding.into_norm(group, weight, bias, scales, dtype, plan.family.norm_offset)


@torch.no_grad()
def fold(block: Block, plan: LayerPlan, folding: Folding) -> None:
    """Fold the scales into the layer, and round what is not quantized to its dtype on disk."""
    block.fold(folding)
    for name, tensor in block.state().items():
        module, _, kind = name.rpartition(".")
        if not (kind == "weight" and module in plan.converted):
            tensor.copy_(stored(plan, name, tensor))


def round_in_place(block: Block, plan: LayerPlan, name: str, scales: Tensor | None = None) -> None:
    """Replace a weight with Q(W), or Q(W s) / s, where Q rounds to nearest."""
    weight = block.weight(name)
    size, zero_point = plan.config.group_of(weight.shape[1]), plan.config.zero_point
    for rows in torch.split(weight, rows_at_once(weight)):
        if scales is None:
            rows.copy_(fake_quantize(rows, size, zero_point))
        else:
            rows.copy_(fake_quantize(rows * scales, size, zero_point).div_(scales))
