"""The search on tensors alone, against brute force and against the rule it must never break."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squawq.format.groupwise import fake_quantize, quantize
from squawq.layerwise.plan import norm_scales
from squawq.quantization.search import best_scales, clip_limits, scale_candidates, scaled_difference, weight_importance
from squawq.quantization.statistics import InputStatistics, gram_loss


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics_of(x: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[-1], "cpu")
    for piece in torch.split(x, 7):
        statistics.update(piece)
    return statistics


def test_gram_loss_is_the_output_error() -> None:
    x, difference = gaussian(50, 32), gaussian(8, 32, seed=1)
    expected = float((x @ difference.T).square().sum())
    assert gram_loss(difference, statistics_of(x).gram) == pytest.approx(expected, rel=1e-4)


def test_statistics_leave_out_what_is_not_finite() -> None:
    x = gaussian(20, 16)
    spoiled = torch.cat((x, torch.full((3, 16), torch.nan), torch.full((1, 16), torch.inf)))
    statistics = statistics_of(spoiled)
    assert (statistics.rows, statistics.dropped) == (20, 4)
    assert torch.allclose(statistics.mean_absolute, x.abs().mean(0), atol=1e-6)
    assert statistics.has_signal
    assert not statistics_of(torch.zeros(4, 16)).has_signal
    assert not InputStatistics(16, "cpu").has_signal


def test_gram_blocks_follow_the_scales() -> None:
    x, scales = gaussian(40, 32), torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.5
    expected, found = statistics_of(x / scales), statistics_of(x)
    found.divide(scales)
    assert torch.allclose(found.gram_blocks(16), expected.gram_blocks(16), rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.mean_absolute, expected.mean_absolute)


def test_candidates_hold_identity_and_ratio_one_in_both_formulas() -> None:
    candidates = scale_candidates(gaussian(32).abs(), gaussian(32, seed=1).abs() + 0.1, 20)
    labels = {(c.formula, c.ratio) for c in candidates}
    assert candidates[0].formula == "identity"
    assert {("x", 1.0), ("xw", 1.0), ("xw", 0.0), ("x", 0.05)} <= labels
    assert len(candidates) == 42


def test_candidates_against_autoawqs_formula() -> None:
    x, w = gaussian(32).abs() + 0.01, gaussian(32, seed=1).abs() + 0.1
    expected = (x**0.5 / (w**0.5 + 1e-4)).clamp(min=1e-4)
    expected = expected / (expected.max() * expected.min()).sqrt()
    found = next(c for c in scale_candidates(x, w, 20) if (c.formula, c.ratio) == ("xw", 0.5))
    assert torch.allclose(found.scales, expected)


def test_dead_channels_keep_scale_one_and_do_not_move_the_others() -> None:
    x, w = gaussian(32).abs() + 0.1, gaussian(32, seed=1).abs() + 0.1
    alone = scale_candidates(x, w, 4)
    padded = scale_candidates(torch.cat((x, torch.zeros(8))), torch.cat((w, torch.zeros(8))), 4)
    for a, b in zip(alone, padded, strict=True):
        assert torch.equal(b.scales[:32], a.scales)
        assert (b.scales[32:] == 1).all()
    assert len(scale_candidates(torch.zeros(8), torch.ones(8), 4)) == 1


def test_best_scales_is_the_brute_force_minimum() -> None:
    weight, x = gaussian(24, 32), gaussian(100, 32, seed=1)
    x[:, 3] *= 30
    statistics = statistics_of(x)
    candidates = scale_candidates(x.abs().mean(0), weight_importance([weight], 16), 10)
    losses = [gram_loss(scaled_difference(weight, c.scales, 16, True), statistics.gram) for c in candidates]
    best = best_scales(candidates, [weight], statistics.loss, 16, True)
    assert best is candidates[min(range(len(losses)), key=losses.__getitem__)]
    assert min(losses) < 0.5 * losses[0]  # an outlier channel is what AWQ is for
    assert best_scales(candidates, [weight], statistics.loss, 16, True, inspect=lambda c: c.ratio).ratio == 0.0


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 20),
    groups=st.integers(1, 3),
    seed=st.integers(0, 999),
    zero_point=st.booleans(),
    whole=st.booleans(),
)
def test_clip_never_loses_to_the_full_range(out: int, groups: int, seed: int, zero_point: bool, whole: bool) -> None:
    weight, x = gaussian(out, groups * 16, seed=seed), gaussian(64, groups * 16, seed=seed + 1)
    energy = x.square().sum(0).view(groups, 16)
    assert torch.allclose(statistics_of(x).energy.view(groups, 16), energy, rtol=1e-4)
    blocks = statistics_of(x).gram_blocks(16) if whole else torch.diag_embed(energy)
    limits = clip_limits(weight, blocks if whole else energy, zero_point)

    def errors(rounded: torch.Tensor) -> torch.Tensor:
        difference = (rounded - weight).view(out, groups, 16).transpose(0, 1)
        return ((difference @ blocks) * difference).sum(-1)

    clipped = errors(quantize(weight, 16, zero_point, limits).dequantize())
    full = errors(fake_quantize(weight, 16, zero_point))
    assert (clipped <= full * 1.001 + 1e-6).all()


def test_clip_in_chunks_equals_clip_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = gaussian(33, 64), gaussian(64, 64, seed=1)
    blocks = statistics_of(x).gram_blocks(32)
    whole = clip_limits(weight, blocks, True)
    monkeypatch.setattr("squawq.quantization.search.CHUNK", 64 * 5)
    pieces = clip_limits(weight, blocks, True)
    assert torch.allclose(whole[0], pieces[0], atol=1e-3)
    assert torch.allclose(whole[1], pieces[1], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folding_is_exact_in_16_bits(dtype: torch.dtype) -> None:
    norm, scales = gaussian(64).to(dtype).float(), torch.rand(64) * 3 + 0.1
    norm[5] = 0
    folded, used = norm_scales(norm, scales, dtype)
    assert torch.equal(folded, folded.to(dtype).float())
    assert torch.allclose(folded * used, norm, rtol=1e-6, atol=0)
    assert torch.allclose(used[norm != 0], scales[norm != 0], rtol=2**-8)
