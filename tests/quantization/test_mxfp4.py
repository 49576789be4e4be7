"""gpt-oss as it is published: experts in MXFP4, read as transformers dequantizes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_models import VOCABULARY, family_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import squawq
from squawq.errors import CheckpointError, ConfigError
from squawq.format.mxfp4 import dequantize
from squawq.inspection import inspect
from squawq.quant_config import QuantConfig

SMALL = QuantConfig(group_size=32, seqlen=32, samples=8, n_grid=3)
ROWS = torch.randint(2, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(5)).tolist()


def mxfp4_folder(folder: Path, dense: Path) -> None:
    """Random MXFP4 experts, and in `dense` the same weights in float32 by transformers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    family_model("gpt_oss", dense)
    tensors = load_file(dense / "model.safetensors")
    packed, plain = dict(tensors), dict(tensors)
    generator = torch.Generator().manual_seed(3)
    for name, stack in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, rows = stack.shape
            shape = experts, rows, inputs // 32
            packed[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).byte()
            packed[f"{name}_scales"] = torch.randint(121, 126, shape, generator=generator).byte()
            parts = packed.pop(name), packed[f"{name}_blocks"], packed[f"{name}_scales"]
            plain[name] = convert_moe_packed_tensors(*parts[1:], dtype=torch.float32)
            assert plain[name].shape == parts[0].shape
    save_file(plain, dense / "model.safetensors", {"format": "pt"})
    folder.mkdir()
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))


def test_the_same_integers_as_of_the_dequantized_model(tmp_path: Path) -> None:
    mxfp4_folder(tmp_path / "mxfp4", tmp_path / "dense")
    reports = []
    for name in ("mxfp4", "dense"):
        reports.append(squawq.quantize(tmp_path / name, tmp_path / f"{name}-awq", SMALL, calibration=ROWS))
    first, second = (
        {n: t for file in (tmp_path / f"{name}-awq").glob("*.safetensors") for n, t in load_file(file).items()}
        for name in ("mxfp4", "dense")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "model.layers.0.mlp.experts.3.gate_proj.qweight" in first
    inspected = [inspect(tmp_path / name) for name in ("mxfp4", "dense")]
    assert len({found["parameters"] for found in (*reports, *inspected)}) == 1
    assert {"mxfp4", "float32"} == {form for linear in inspected[0]["linears"] for form in linear["layers"]}
    config = json.loads((tmp_path / "mxfp4-awq" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq"


def test_all_sixteen_values_and_nan() -> None:
    blocks = torch.arange(16, dtype=torch.uint8).view(1, 1, 16) * 17  # both nibbles alike
    found = dequantize(blocks, torch.tensor([[128]], dtype=torch.uint8))
    halves = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert found[0, ::2].tolist() == found[0, 1::2].tolist() == [2 * v for v in (*halves, *(-v for v in halves))]
    assert dequantize(blocks, torch.tensor([[255]], dtype=torch.uint8)).isnan().all()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("gate_up_proj_scales", lambda t: t.fill_(255), "not finite"),
        ("gate_up_proj_blocks", lambda t: t[:, :, :1].contiguous(), r"torch.uint8 \[experts, 192, 2, 16\] is needed"),
        ("down_proj_scales", lambda t: t[:3].contiguous(), r"\[experts, 64, 3\] is needed"),
        ("down_proj_blocks", lambda t: t.float(), r"torch.uint8 \[experts, 64, 3, 16\] is needed"),
    ],
)
def test_damaged_mxfp4(part: str, change: Callable[[Tensor], Tensor], message: str, tmp_path: Path) -> None:
    mxfp4_folder(tmp_path / "mxfp4", tmp_path / "dense")
    file = tmp_path / "mxfp4" / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.1.mlp.experts.{part}"
    tensors[name] = change(tensors[name])
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        squawq.quantize(tmp_path / "mxfp4", tmp_path / "awq", SMALL, calibration=ROWS)


def test_experts_that_do_not_fit_a_group_size(tmp_path: Path) -> None:
    mxfp4_folder(tmp_path / "mxfp4", tmp_path / "dense")
    config = QuantConfig(group_size=64, seqlen=32, samples=8, n_grid=3)  # down_proj has 96 inputs
    with pytest.raises(ConfigError, match=r"experts\.0\.\w+: .*\. Choose a group_size that fits all"):
        squawq.quantize(tmp_path / "mxfp4", tmp_path / "awq", config, calibration=ROWS)
