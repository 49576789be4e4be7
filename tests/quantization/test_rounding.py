"""Rounding with error feedback, against GPTQ written down as its paper has it, and as rules that hold for any input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squawq.backends.cpu import library
from squawq.format.groupwise import GroupwiseTensor, quantize, round_to_grid
from squawq.quant_config import QuantConfig
from squawq.quantization import rounding
from squawq.quantization.rounding import DampedGram, Grid, LinearQuantizer
from squawq.quantization.search import whole_ranges
from squawq.quantization.statistics import InputStatistics

GROUP = 32


def inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Correlated, and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) * 0.4 + torch.eye(features)
    return (torch.randn(tokens, features, generator=generator) @ mix) * torch.logspace(-1, 1, features)


def weight(rows: int, features: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))


def grid_of(target: Tensor) -> Grid:
    return Grid.of(whole_ranges(target, GROUP), GROUP, zero_point=True)


def rounded(damped: DampedGram, target: Tensor, grid: Grid, compensate: bool, passes: int) -> GroupwiseTensor:
    q, scale = damped.round(target, grid, compensate, passes)
    return Grid(scale, grid.zero, grid.group).tensor(q)


def loss(found: GroupwiseTensor, target: Tensor, gram: Tensor) -> float:
    difference = (found.dequantize() - target).double()
    return float(((difference @ gram.double()) * difference).sum())


def gptq(target: Tensor, gram: Tensor, grid: Grid, order: Tensor) -> Tensor:
    """Frantar et al., algorithm 1, in float64 and without blocks: the inverse's Cholesky factor feeds errors on."""
    factor = torch.linalg.cholesky(torch.linalg.inv(gram.double()[order][:, order]), upper=True)
    rest, q = target.double()[:, order].clone(), torch.zeros(target.shape[::-1])
    for place, column in enumerate(order.tolist()):
        scale, zero = grid.scale[column // GROUP].double(), grid.zero[column // GROUP].double()
        q[column] = round_to_grid(rest[:, place], scale, zero)
        error = (rest[:, place] - (q[column] - zero) * scale) / factor[place, place]
        rest[:, place:] -= error[:, None] * factor[place, place:]
    return q.to(torch.uint8)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("features", [96, 320])
def test_gptqs_integers(features: int, act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "CHUNK", 40 * features)  # several chunks of rows
    x, target = inputs(2000, features), weight(100, features)
    gram, grid = x.T @ x, grid_of(weight(100, features))
    damped = DampedGram(gram, 0.1, act_order)
    diagonal = gram.diagonal()
    order = diagonal.argsort(stable=True).flip(0) if act_order else torch.arange(features)
    expected = gptq(target, gram + torch.diag(0.1 * diagonal + rounding.FLOOR * diagonal.mean()), grid, order)
    found, scale = damped.round(target, grid, compensate=True, passes=0)
    assert torch.equal(scale, grid.scale)
    assert (found != expected).float().mean() < 0.002  # a value between two integers may turn, and those after it


def test_without_the_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x, target = inputs(2000, 320), weight(100, 320)
    damped, grid = DampedGram(x.T @ x, 0.1, act_order=True), grid_of(target)
    found = rounded(damped, target, grid, compensate=True, passes=1)
    monkeypatch.setattr(library, "load", lambda: None)
    again = rounded(damped, target, grid, compensate=True, passes=1)
    assert (again.q != found.q).float().mean() < 0.002
    assert torch.allclose(again.scales, found.scales, rtol=1e-2)


def test_each_step_loses_less() -> None:
    x, target = inputs(2000, 256), weight(64, 256)
    gram, grid = x.T @ x, grid_of(weight(64, 256))
    damped = DampedGram(gram, 0.0, act_order=True)
    nearest = loss(quantize(target, GROUP, True), target, gram)
    found = [loss(rounded(damped, target, grid, True, passes), target, gram) for passes in (0, 1, 2)]
    assert found[0] < 0.6 * nearest
    assert found[2] < found[1] < found[0]
    assert loss(rounded(damped, target, grid, False, 0), target, gram) == pytest.approx(nearest)
    assert loss(rounded(damped, target, grid, False, 2), target, gram) < 0.8 * nearest


def test_a_scale_is_where_its_integers_lose_least() -> None:
    """Of one group, against least squares in float64; a group without signal keeps its scale."""
    x, target = inputs(2000, GROUP), weight(64, GROUP)
    gram, grid = x.T @ x, grid_of(target)
    levels = grid.nearest(target.T.contiguous())
    energy, steps = gram.diagonal()[:, None], (levels - grid.zero[0]).double()
    levels[:, 7] = grid.zero[0, 7]
    before, pull = grid.scale.clone(), gram / energy @ (target.T - grid.values(levels))
    change = grid.fit(levels, pull, gram / energy, energy, torch.tensor(0))
    by_gram = gram.double() @ steps
    best = ((by_gram * target.T).sum(0) / (by_gram * steps).sum(0)).float()
    others = torch.arange(64) != 7
    assert torch.allclose(grid.scale[0, others], best[others], rtol=1e-3)
    assert (grid.scale[0, others] != before[0, others]).any()
    assert grid.scale[0, 7] == before[0, 7]
    assert torch.equal(grid.scale, grid.scale.half().float())
    assert torch.allclose(change, (levels - grid.zero[0]) * (grid.scale - before), atol=1e-6)


def test_large_groups_keep_their_scales() -> None:
    x, target = inputs(2000, 512), weight(16, 512)
    grid = Grid.of(whole_ranges(target, 256), 256, zero_point=True)
    _, scale = DampedGram(x.T @ x, 0.1, act_order=True).round(target, grid, compensate=True, passes=2)
    assert torch.equal(scale, grid.scale)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**31), st.floats(0, 2), st.integers(0, 3), st.booleans())
def test_rules(rows: int, seed: int, damping: float, passes: int, few: bool) -> None:
    """Integers are of the grid, descent never loses what it minimizes, fewer inputs than columns are no obstacle."""
    x, target = inputs(20 if few else 300, 64, seed), weight(rows, 64, seed + 1)
    x[:, 5] = 0
    gram, grid = x.T @ x, grid_of(target)
    damped = DampedGram(gram, damping, act_order=bool(seed % 2))
    before, after = (rounded(damped, target, grid, bool(seed % 3), n) for n in (passes, passes + 1))
    assert int(after.q.max()) <= 15
    raised = gram + torch.diag(damped.ridge)
    assert loss(after, target, raised) <= loss(before, target, raised) * (1 + 1e-5) + 1e-6


def test_solve_inverts() -> None:
    x, owed = inputs(500, 96), weight(10, 96)
    damped = DampedGram(x.T @ x, 0.2, act_order=True)
    whole = (x.T @ x).double() + torch.diag(damped.ridge.double())
    assert torch.allclose(damped.solve(owed).double() @ whole, owed.double(), atol=1e-3)


def rounder(x: Tensor, without: tuple[str, ...]) -> LinearQuantizer:
    stats = InputStatistics(x.shape[1], "cpu")
    stats.update(x)
    config = QuantConfig(group_size=GROUP, compensate="compensate" not in without, refine=int("refine" not in without))
    return LinearQuantizer(stats, config)


def test_every_switch_matters() -> None:
    """The whole loses less than any without a part of it."""
    x = inputs(2000, 128)
    losses = {}
    for without in (), ("clip",), ("refine",), ("compensate",), ("compensate", "refine"):
        target = weight(64, 128)
        integers, limits = rounder(x, without).quantize(target, clip="clip" not in without)
        assert torch.equal(target, weight(64, 128))  # nothing was lacking
        assert (limits is None) == ("clip" in without)
        losses[without] = float(((x @ (integers.dequantize() - target).T) ** 2).sum())
    assert losses[()] < min(losses["clip",], losses["refine",], losses["compensate", "refine"])
    assert losses["compensate",] < losses["compensate", "refine"]


def test_wide_inputs_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the Gram matrix are rounded on their own, also where a group spans them all."""
    from squawq.quantization import statistics

    monkeypatch.setattr(statistics, "MAX_GRAM", 64)
    monkeypatch.setattr(statistics, "BOUNDARY", 32)
    x = inputs(2000, 160)
    for group in (32, -1):
        target = weight(24, 160)
        stats = InputStatistics(160, "cpu")
        stats.update(x)
        assert len(stats.spans) == 3
        integers, _ = LinearQuantizer(stats, QuantConfig(group_size=group)).quantize(target, clip=True)
        nearest = quantize(target, 160 if group == -1 else group, True).dequantize()
        assert stats.loss(integers.dequantize() - target) < 0.8 * stats.loss(nearest - target)
