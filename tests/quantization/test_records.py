"""The report's rows: what summaries say, and that nothing goes into them which JSON does not have."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from conftest import MakeModel

import squawq
from squawq.memory import MEASURED, measured
from squawq.quant_config import QuantConfig
from squawq.quantization import statistics
from squawq.quantization.statistics import clip_quantiles, quantiles
from squawq.report.schema import LayerRow, LinearRow, ScaleRow


def test_quantiles_of_a_few_values_and_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantiles(torch.arange(101.0).view(1, 101)) == [0, 5, 50, 95, 100]
    assert quantiles(torch.tensor([3.0])) == [3] * 5
    monkeypatch.setattr(statistics, "SAMPLED", 50)
    values = torch.arange(10_000.0)
    values[1] = -7  # between the sampled ones: the least and the greatest are never missed
    found = quantiles(values)
    assert (found[0], found[4]) == (-7, 9999)
    assert found[2] == pytest.approx(5000, rel=0.03)


def test_share_of_the_range_that_is_kept() -> None:
    weight = torch.tensor([[-1.0, 1.0, -2.0, 2.0], [0.0, 0.0, -1.0, 3.0]])
    low, high = torch.tensor([[-1.0, -1.0], [0.0, -1.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    found = clip_quantiles(weight, (low, high))  # shares 1, 0.5, 1 (no range at all), 0.5
    assert (found[0], found[2], found[4]) == (0.5, 0.75, 1)


def test_rows_have_only_what_is_known_and_json_takes() -> None:
    rows = [
        LinearRow(name="a", out_features=8, in_features=16, kept_in_16_bits="skipped"),
        LinearRow(name="b", out_features=8, in_features=16, tokens=0, loss_rounded=math.inf, loss=0.5),
    ]
    group = ScaleRow(linears=["a", "b"], formula="x", ratio=0.5, quantiles=[1.0] * 5)
    found = LayerRow(
        name="model.layers.0",
        method="awq",
        loss_rounded=math.nan,
        loss=0.25,
        relative_error=math.inf,
        scales=[group],
        linears=rows,
        notes=["odd"],
    ).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["loss_rounded"], found["loss"], found["relative_error"]) == (None, 0.25, None)
    assert found["scales"] == [{"linears": ["a", "b"], "formula": "x", "ratio": 0.5, "quantiles": [1.0] * 5}]
    assert found["linears"] == [
        {"name": "a", "out_features": 8, "in_features": 16, "kept_in_16_bits": "skipped"},
        {"name": "b", "out_features": 8, "in_features": 16, "tokens": 0, "loss": 0.5},
    ]


def test_a_loss_that_rounds_to_below_zero_is_none() -> None:
    """It was written as it was; a row that refuses it would end a run of hours."""
    assert LinearRow(name="a", out_features=8, in_features=16, loss_rounded=-1e-12, loss=-0.0).to_dict() == {
        "name": "a",
        "out_features": 8,
        "in_features": 16,
        "loss_rounded": 0.0,
        "loss": 0.0,
    }


def test_measured_keys() -> None:
    found = measured(time.perf_counter() - 2, "cpu")
    assert set(found) <= set(MEASURED)
    assert 2 <= found["seconds"] < 100
    assert found["peak_bytes"] > 10_000_000


@pytest.mark.parametrize("method", ["squawq", "awq"])
def test_a_real_layer_has_them_all(method: str, make_model: MakeModel, rows: list[list[int]], tmp_path: Path) -> None:
    config = QuantConfig(group_size=32, samples=8, seqlen=32, method=method)
    report = squawq.quantize(make_model(), tmp_path / "out", config, calibration=rows)
    assert report["model"] == "model"
    assert report["parameters"] == 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96 + 2 * 64) + 2 * 160 * 64 + 64
    for layer in report["layers"]:
        assert layer["seconds"] > 0
        assert layer["peak_bytes"] > 10_000_000
        assert all(len(row["quantiles"]) == 5 for row in layer["scales"])
        for row in layer["linears"]:
            clipped = method != "awq" or not row["name"].endswith(("q_proj", "k_proj"))
            assert ("clip" in row) == clipped
            assert not clipped or 0.5 < row["clip"][0] <= row["clip"][4] == 1
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<h1>out</h1>" in page  # not out.partial, as it was called until then
    assert "--dtype" not in page
    assert page.count("<figure") == 1 + 1 + 3 + 1 + 2
