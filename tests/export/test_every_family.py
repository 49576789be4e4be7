"""Every family's AWQ folder in the other formats, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_models import CASES, dense_folder, family_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from squawq.evaluation.run import evaluate
from squawq.export.dense import STACKS
from squawq.export.run import export
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("model_type", CASES)
def test_there_and_back(model_type: str, tmp_path: Path) -> None:
    """As GPTQ and as compressed-tensors, from which AWQ is made again, tensor by tensor the same; and in 16 bits."""
    family_model(model_type, tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "awq", QuantConfig(method="rtn", group_size=32), progress=False)
    expected = tensors_of(tmp_path / "awq")
    for format_ in ("gptq", "compressed-tensors"):
        export(tmp_path / "awq", tmp_path / format_, format_)
        export(tmp_path / format_, tmp_path / f"{format_}-awq", "awq")
        found = tensors_of(tmp_path / f"{format_}-awq")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    export(tmp_path / "awq", tmp_path / "dense", "dense")
    dense_folder(tmp_path / "awq", tmp_path / "model", tmp_path / "expected")
    found, wanted = (loaded(tmp_path / name) for name in ("dense", "expected"))
    assert all((found[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max() for name, tensor in wanted.items())
    if model_type in STACKS:  # as our own quantizer reads them
        ids = torch.randint(2, 150, (32,), generator=torch.Generator().manual_seed(5)).tolist()
        assert evaluate(tmp_path / "dense", tmp_path / "awq", ids=ids, window=32)["kl_mean"] < 1e-4


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that transformers reads, which are all and nothing else."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights
