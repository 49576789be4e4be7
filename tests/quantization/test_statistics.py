"""Sums over a linear's inputs: exact enough for long calibrations, in blocks where wide, additive over processes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from squawq.quantization import statistics
from squawq.quantization.statistics import InputStatistics, gram_loss, gram_spans, relative_error


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics_of(x: Tensor, piece: int = 50) -> InputStatistics:
    found = InputStatistics(x.shape[-1], "cpu")
    for rows in torch.split(x, piece):
        found.update(rows)
    return found


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide begins at 64 inputs, and groups have up to 16."""
    monkeypatch.setattr(statistics, "MAX_GRAM", 64)
    monkeypatch.setattr(statistics, "BOUNDARY", 16)
    monkeypatch.setattr(statistics, "PANEL", 20)


@pytest.mark.parametrize(
    ("features", "widths"),
    [
        (64, [64]),
        (16384, [16384]),
        (16385, [8192, 8193]),
        (28672, [14336] * 2),
        (53248, [13312] * 4),
        (128 * 131, [8448, 8320]),
        (32767, [16384, 16383]),
    ],
)
def test_spans_are_equal_and_never_cut_a_group(features: int, widths: list[int]) -> None:
    spans = gram_spans(features)
    assert [s.stop - s.start for s in spans] == widths
    assert [s.start for s in spans[1:]] == [s.stop for s in spans[:-1]]
    assert (spans[0].start, spans[-1].stop) == (0, features)
    assert all(s.start % 256 == 0 for s in spans)


def test_long_sums_stay_exact() -> None:
    """65,536 inputs of one sign and of very different sizes, a few at a time, against float64."""
    x = gaussian(65536, 48).abs() * torch.logspace(-2, 2, 48)
    exact = x.double().T @ x.double()
    for piece in (64, 65536):
        found = statistics_of(x, piece)
        assert ((found.gram - exact) / exact).abs().max() < 5e-6
        assert torch.allclose(found.absolute, x.double().abs().sum(0), rtol=1e-6)
        assert found.rows == 65536


def test_blocks_are_the_whole_matrix_without_what_lies_between(narrow: None) -> None:
    x = gaussian(300, 160)
    whole, found = x.T @ x, statistics_of(x)
    assert [s.stop - s.start for s in found.spans] == [48, 48, 64]
    for span in found.spans:
        assert torch.allclose(found.gram_of(span), whole[span, span], rtol=1e-5, atol=1e-3)
        assert torch.equal(found.gram_of(span), found.gram_of(span).T)
    assert torch.allclose(found.gram_blocks(16)[4], whole[64:80, 64:80], rtol=1e-5, atol=1e-3)
    assert found.gram_blocks(16).shape == (10, 16, 16)
    (row,) = found.gram_blocks(160)
    assert torch.equal(row[:48, :48], found.gram_of(found.spans[0]))
    assert not row[:48, 48:].any()
    with pytest.raises(ValueError):
        _ = found.gram


def test_loss_adds_up_over_the_spans(narrow: None) -> None:
    x, difference = gaussian(300, 160), gaussian(8, 160, seed=1)
    found = statistics_of(x)
    expected = sum(float((x[:, s] @ difference[:, s].T).square().sum()) for s in found.spans)
    assert found.loss(difference) == pytest.approx(expected, rel=1e-4)
    assert found.loss(difference) != pytest.approx(gram_loss(difference, x.T @ x), rel=1e-4)


def test_loss_of_narrow_inputs_is_the_output_error() -> None:
    x, difference = gaussian(50, 32), gaussian(8, 32, seed=1)
    expected = float((x @ difference.T).square().sum())
    assert statistics_of(x).loss(difference) == pytest.approx(expected, rel=1e-4)


def test_two_processes_sums_add_up(narrow: None) -> None:
    x = gaussian(300, 160)
    x[7, 3] = torch.inf
    halves, whole = [statistics_of(half) for half in (x[:100], x[100:])], statistics_of(x)
    assert halves[0].gram_of(halves[0].spans[0]).any()  # looking does no harm
    for mine, other, both in zip(halves[0].sums, halves[1].sums, whole.sums, strict=True):
        mine += other
        if mine.dim() < 2:
            assert torch.allclose(mine, both)
    assert all(torch.allclose(halves[0].gram_of(s), whole.gram_of(s), rtol=1e-5, atol=1e-3) for s in whole.spans)
    assert (halves[0].rows, halves[0].dropped) == (whole.rows, whole.dropped) == (299, 1)


def test_relative_error_counts_tokens_alike() -> None:
    wanted = torch.tensor([[1e5, 0.0], [3.0, 4.0], [0.0, 0.0]])
    found = wanted + torch.tensor([[1e3, 0.0], [0.0, 0.5], [0.0, 0.0]])
    assert relative_error(found, wanted) == pytest.approx(math.sqrt((0.01**2 + 0.1**2) / 3))
    assert relative_error(found.half() * 1e3, wanted) == math.inf
    assert relative_error(torch.full((1, 2), 3e38), torch.full((1, 2), 3e38)) == 0
