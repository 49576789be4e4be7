"""Chooses the AWQ scales of a layer, folds them into it, and chooses the clipping ranges of a weight.

Lin et al., AWQ, arXiv 2306.00978. Grid, weight term and clamp are AutoAWQ's (awq/quantize/quantizer.py). Added here:
identity, ratio 1.0, both formulas, ranges shrunk at both ends; channels without signal do not enter the normalization.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squawq.families import ScalingGroup
from squawq.format.groupwise import fake_quantize, round_to_grid, scale_and_zero
from squawq.layerwise.blocks import Block
from squawq.layerwise.extra_inputs import ExtraInputs
from squawq.layerwise.plan import Folding, LayerPlan
from squawq.quantization.statistics import InputStatistics, LayerInputs, mean_square, quantiles
from squawq.report.schema import ScaleRow

SAMPLED_ROWS = 64  # output rows that a candidate is judged on
REFINED = 2  # best candidates, which are compared on the output of the module in `inspect`
CLIP_STEPS = 10
CLIP_GRID = 20  # ranges shrink by steps of 1/20, down to 0.55
CHUNK = 1 << 22  # weights in one copy
SAMPLED_LINEARS = 16  # linears of a group that its scales are judged on: the linears of many experts are much alike


@dataclass(frozen=True)
class ScaleCandidate:
    """Scales float32 [in] that multiply a weight's columns; formula "identity", "x" or "xw", ratio 0 to 1."""

    formula: str
    ratio: float
    scales: Tensor


def weight_importance(weights: Sequence[Tensor], group: int) -> Tensor:
    """Mean over rows of |w| / max |w| of its group, float32 [in], for weights float32 [out, in] that share an input."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for rows in (part for weight in weights for part in torch.split(weight, rows_at_once(weight))):
        grouped = rows.abs().view(len(rows), -1, group)
        total += (grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).view(rows.shape).sum(0)
    return total / sum(w.shape[0] for w in weights)


def scale_candidates(x_mean: Tensor, w_mean: Tensor, n_grid: int) -> list[ScaleCandidate]:
    """The grid of scales: identity, x^r, and x^r / w^(1-r), for r from 0 to 1.

    Channels without signal (x or w zero throughout) keep scale 1 and do not enter the normalization.

    Args:
        x_mean: Mean |x| of the input, float32 [in].
        w_mean: See `weight_importance`, float32 [in].
        n_grid: Steps of r.
    """
    identity = ScaleCandidate("identity", 0.0, torch.ones_like(x_mean))
    alive = (x_mean > 0) & (w_mean > 0) & torch.isfinite(x_mean)
    if not bool(alive.any()):
        return [identity]
    x, w = x_mean[alive], w_mean[alive]
    candidates = [identity]
    for step in range(n_grid + 1):
        ratio = step / n_grid
        for formula, raw in (("x", x**ratio), ("xw", x**ratio / (w ** (1 - ratio) + 1e-4))):
            raw = raw.clamp(min=1e-4)
            scales = torch.ones_like(x_mean)
            scales[alive] = raw / (raw.max() * raw.min()).sqrt()
            if bool(torch.isfinite(scales).all()) and not (formula == "x" and step == 0):
                candidates.append(ScaleCandidate(formula, ratio, scales))
    return candidates


def rows_at_once(weight: Tensor) -> int:
    """How many rows of a weight [out, in] to process at once: a copy of all would be large."""
    return max(1, CHUNK // weight.shape[1])


def sampled_rows(weight: Tensor) -> slice:
    """Rows of a weight [out, in] that losses are measured on: at most SAMPLED_ROWS, evenly spaced."""
    return slice(None, None, -(-weight.shape[0] // SAMPLED_ROWS))


def scaled_difference(weight: Tensor, scales: Tensor, group: int, zero_point: bool) -> Tensor:
    """Q(W s) / s - W, for W float32 [rows, in] and scales s float32 [in]; Q rounds to nearest."""
    return fake_quantize(weight * scales, group, zero_point) / scales - weight


def best_scales(
    candidates: list[ScaleCandidate],
    weights: Sequence[Tensor],
    loss: Callable[[Tensor], float],
    group: int,
    zero_point: bool,
    inspect: Callable[[ScaleCandidate], float] | None = None,
) -> ScaleCandidate:
    """The candidate with the least loss.

    Args:
        candidates: Identity first.
        weights: float32 [out, in] of linears that share an input.
        loss: Output error of a weight difference float32 [rows, in] (`InputStatistics.loss`); ranks all candidates.
        group: Group size.
        zero_point: Whether ranges are asymmetric.
        inspect: Loss on the output of the module around the linears; decides between the REFINED best and identity.
    """
    sampled = [w[sampled_rows(w)] for w in weights]
    rows = torch.cat(sampled)
    stands_for = torch.cat([r.new_full((len(r), 1), len(w) / len(r)) for w, r in zip(weights, sampled, strict=True)])

    def proxy(candidate: ScaleCandidate) -> float:
        return loss(scaled_difference(rows, candidate.scales, group, zero_point) * stands_for.sqrt())

    ranked = sorted(candidates, key=proxy)
    if inspect is None or len(ranked) == 1:
        return ranked[0]
    finalists = ranked[:REFINED]
    if candidates[0] not in finalists:
        finalists.append(candidates[0])
    return min(finalists, key=inspect)


def whole_ranges(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Ranges (low, high), each float32 [out, groups], that clip nothing."""
    low, high = weight.view(len(weight), -1, group).aminmax(dim=-1)
    return low, high


def clip_limits(weight: Tensor, gram: Tensor, zero_point: bool) -> tuple[Tensor, Tensor]:
    """For each row and group, the range with the least error.

    Tries the full range, the range with both ends shrunk by a factor, and AutoAWQ's symmetric clamp.

    Args:
        weight: float32 [out, in].
        gram: The Hessian's diagonal blocks, float32 [groups, group, group]; a group's error is d' H d for its weight
            difference d. Before rounding with error feedback: their diagonals alone, float32 [groups, group].
        zero_point: Whether ranges are asymmetric.

    Returns:
        (low, high), each float32 [out, groups].
    """
    out, features = weight.shape
    group = gram.shape[1]
    low = torch.empty(out, features // group, device=weight.device)
    high = torch.empty_like(low)
    step = rows_at_once(weight)
    for start in range(0, out, step):
        part = slice(start, min(out, start + step))
        low[part], high[part] = _clip_rows(weight[part].view(-1, features // group, group), gram, zero_point)
    return low, high


def _clip_rows(grouped: Tensor, gram: Tensor, zero_point: bool) -> tuple[Tensor, Tensor]:
    full_low, full_high = grouped.amin(-1), grouped.amax(-1)
    extent = torch.maximum(full_low.abs(), full_high.abs())
    best = torch.full_like(full_low, torch.inf)
    low, high = full_low.clone(), full_high.clone()
    for step in range(CLIP_STEPS):
        shrink = 1 - step / CLIP_GRID
        ranges = [(full_low * shrink, full_high * shrink)]
        if zero_point and step:
            ranges.append((torch.maximum(full_low, -extent * shrink), torch.minimum(full_high, extent * shrink)))
        for try_low, try_high in ranges:
            scale, zero = scale_and_zero(try_low, try_high, zero_point)
            scale, zero = scale[..., None], zero[..., None]
            difference = round_to_grid(grouped, scale, zero).sub_(zero).mul_(scale).sub_(grouped)
            if gram.dim() == 3:
                by_group = difference.transpose(0, 1)
                error = ((by_group @ gram) * by_group).sum(-1).T
            else:
                error = difference.square_().mul_(gram).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            low, high = torch.where(better, try_low, low), torch.where(better, try_high, high)
    return low, high


@torch.no_grad()
def choose_scales(
    block: Block, plan: LayerPlan, inputs: LayerInputs, samples: Mapping[str, Tensor], whole: Collection[str]
) -> tuple[Folding, list[ScaleRow]]:
    """Choose the scales of every group, before any linear is rounded: they also change the operation before the group.

    Args:
        block: The 16-bit layer; unchanged.
        plan: Which of its linears are quantized.
        inputs: Statistics, summed over ranks. Those of capture modules not in `whole` are deleted once used.
        samples: Inputs of the modules that scales are judged by (`LayerInputs.sample_modules`).
        whole: Capture modules whose statistics are needed later.

    Returns:
        What to fold into the layer, on the CPU, and a row of the report for each group.
    """
    folding, rows = Folding(), []
    for group in block.groups:
        stats, names = inputs.statistics[group.capture_module], [n for n in group.linears if n in plan.converted]
        if names and stats.has_signal and takes_scales(block, group):
            sampled = names[:: -(-len(names) // SAMPLED_LINEARS)]
            best = _best_scales(block, plan, group, sampled, stats, samples, inputs.extra)
            spread, linears = quantiles(best.scales), list(group.linears)
            rows.append(ScaleRow(linears=linears, formula=best.formula, ratio=best.ratio, quantiles=spread))
            if best.formula != "identity":
                fold_group(block, plan, group, best.scales, folding)
        if group.capture_module not in whole:
            inputs.statistics.pop(group.capture_module, None)
    return folding.to("cpu"), rows


def _best_scales(
    block: Block,
    plan: LayerPlan,
    group: ScalingGroup,
    names: Sequence[str],
    stats: InputStatistics,
    samples: Mapping[str, Tensor],
    extra: ExtraInputs,
) -> ScaleCandidate:
    config, weights = plan.config, [block.weight(name) for name in names]
    size, zero_point = config.group_of(weights[0].shape[1]), config.zero_point
    candidates = scale_candidates(stats.mean_absolute, weight_importance(weights, size), config.scale_steps)
    if not config.duo_scaling:
        candidates = [c for c in candidates if c.formula != "xw"]
    if group.inspect is None or config.error_feedback:  # inspecting would judge rounding to nearest
        return best_scales(candidates, weights, stats.loss, size, zero_point)
    module, given = group.inspect, samples[group.inspect]
    wanted = block.inspect(module, given, extra)

    def inspect(candidate: ScaleCandidate) -> float:
        for name in names:
            round_in_place(block, plan, name, candidate.scales)
        loss = mean_square(block.inspect(module, given, extra), wanted)
        for name in names:
            block.restore(f"{name}.weight")  # from disk: a second copy of the weights would be large
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
    """Add the scales of a group, float32 [in], to `folding`."""
    weight = block.weight(group.previous)
    if weight.dim() == 2:
        folding.into_linear(group, len(weight), scales)
    else:
        bias = getattr(block.module.get_submodule(group.previous), "bias", None)
        bias = bias.data if isinstance(bias, Tensor) else None
        folding.into_norm(group, weight, bias, scales, plan.dtype, plan.family.norm_offset)


@torch.no_grad()
def fold(block: Block, plan: LayerPlan, folding: Folding) -> None:
    """Fold the scales into the layer, and round what is not quantized to its dtype on disk."""
    block.fold(folding)
    for name, tensor in block.module.state_dict().items():
        module, _, kind = name.rpartition(".")
        if not (kind == "weight" and module in plan.converted):
            tensor.copy_(plan.stored(name, tensor))


def round_in_place(block: Block, plan: LayerPlan, name: str, scales: Tensor | None = None) -> None:
    """Replace a weight with Q(W), or Q(W s) / s, where Q rounds to nearest."""
    weight = block.weight(name)
    size, zero_point = plan.config.group_of(weight.shape[1]), plan.config.zero_point
    for rows in torch.split(weight, rows_at_once(weight)):
        if scales is None:
            rows.copy_(fake_quantize(rows, size, zero_point))
        else:
            rows.copy_(fake_quantize(rows * scales, size, zero_point).div_(scales))
