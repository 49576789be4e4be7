"""The AWQ search on tensors: scale candidates, their loss, and the clipped range of each group.

Lin et al., AWQ, arXiv 2306.00978. Grid, weight term and clipping are AutoAWQ's (awq/quantize/quantizer.py), which lacks
identity, ratio 1.0 and the choice between both formulas, and normalizes over channels without signal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squawq.format.groupwise import fake_quantize, round_to_grid, scale_and_zero

SAMPLED_ROWS = 64  # output rows that a candidate is judged on
REFINED = 2  # candidates that go on to the loss on the inspected module
CLIP_STEPS = 10
CLIP_GRID = 20  # ranges shrink by steps of 1/20, down to 0.55
CHUNK = 1 << 22  # weights handled at once


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
    """Rows of a weight [out, in] that are processed at once, where a copy of all would be large."""
    return max(1, CHUNK // weight.shape[1])


def sampled_rows(weight: Tensor) -> slice:
    """Rows of a weight [out, in] that losses are measured on: at most SAMPLED_ROWS, evenly spaced."""
    return slice(None, None, -(-weight.shape[0] // SAMPLED_ROWS))


def gram_loss(difference: Tensor, gram: Tensor) -> float:
    """tr(D H D'): summed squared output error of a weight difference D [rows, in], for a Hessian H = X'X [in, in]."""
    return float(((difference @ gram) * difference).sum(-1).cpu().sum(dtype=torch.float64))


def scaled_difference(weight: Tensor, scales: Tensor, group: int, zero_point: bool) -> Tensor:
    """Q(W s) / s - W, float32 [rows, in], for scales s float32 [in]."""
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
        loss: Of a weight difference float32 [rows, in] (`InputStatistics.loss`); ranks all candidates.
        group: Group size.
        zero_point: Whether ranges are asymmetric.
        inspect: Loss on the output of the module around the linears; decides between the best few and identity.
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
    """The range with the least error of each row and group, on its own.

    Tries the full range, the range shrunk at both ends, and AutoAWQ's symmetric clamp.

    Args:
        weight: float32 [out, in].
        gram: The Hessian's diagonal blocks [groups, group, group]; a group's error is d' H d for its weight difference
            d. Their diagonals alone [groups, group] where integers are rounded with error feedback.
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
