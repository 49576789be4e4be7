"""Rounding within groups: bounds that hold for all inputs, and AutoAWQ's formula as an independent reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squawq.format.groupwise import fake_quantize, quantize


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 9),
    groups=st.integers(1, 4),
    group=st.sampled_from([16, 32, 64, 128, 256]),
    zero_point=st.booleans(),
    seed=st.integers(0, 2**16),
    spread=st.sampled_from([1e-4, 1e-2, 1.0, 300.0]),
)
def test_error_is_at_most_half_a_step(
    out: int, groups: int, group: int, zero_point: bool, seed: int, spread: float
) -> None:
    weight = torch.randn(out, groups * group, generator=torch.Generator().manual_seed(seed)) * spread
    tensor = quantize(weight, group, zero_point)
    assert tensor.q.max() <= 15
    assert tensor.zeros.max() <= 15
    error = (tensor.dequantize() - weight).abs().view(out, groups, group)
    scale = tensor.scales.float()[..., None]
    # Half a step; the zero itself is rounded, which can cut half a step more off one end; 1e-3 is float16's rounding
    # of the scale over the 15 steps of the range.
    assert (error <= scale * (1.0 + 15e-3)).all()
    inner = error[(tensor.q.view(out, groups, group) > 0) & (tensor.q.view(out, groups, group) < 15)]
    assert (
        inner <= scale.expand_as(error)[(tensor.q.view_as(error) > 0) & (tensor.q.view_as(error) < 15)] * 0.5001
    ).all()


def test_equals_autoawq_formula_on_mixed_signs() -> None:
    """awq/quantize/quantizer.py pseudo_quantize_tensor, written anew in float64: equal integers but for ties."""
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(1))
    grouped = weight.double().view(24, 2, 128)
    scale = ((grouped.amax(-1) - grouped.amin(-1)) / 15).clamp(min=1e-5)[..., None]
    zero = (-(grouped.amin(-1, keepdim=True) / scale).round()).clamp(0, 15)
    expected = ((grouped / scale).round() + zero).clamp(0, 15)
    found = quantize(weight, 128, True).q.view(24, 2, 128)
    assert (found != expected).float().mean() < 0.005  # the scale is rounded to float16 first


@pytest.mark.parametrize("zero_point", [True, False])
def test_zeros_stay_zero(zero_point: bool) -> None:
    weight = torch.zeros(3, 64)
    weight[1, 5] = 2.0
    back = fake_quantize(weight, 32, zero_point)
    assert (back[0] == 0).all()
    assert (back[1, 32:] == 0).all()


def test_a_group_of_one_sign_keeps_its_values() -> None:
    weight = torch.linspace(1.0, 1.2, 16).view(1, 16)
    assert (fake_quantize(weight, 16, True) - weight).abs().max() < 0.05


def test_narrow_limits_clip() -> None:
    weight = torch.linspace(-1, 1, 32).view(1, 32)
    clipped = quantize(weight, 32, True, (torch.tensor([[-0.5]]), torch.tensor([[0.5]]))).dequantize()
    assert clipped.max() <= 0.55
    assert clipped.min() >= -0.55
