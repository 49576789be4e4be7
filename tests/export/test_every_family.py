"""Every family's AWQ folder in the other formats, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_models import CASES, family_model
from safetensors.torch import load_file

from squawq.errors import CheckpointError
from squawq.export.dense import STACKED_ALONE
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
    if model_type in STACKED_ALONE:
        with pytest.raises(CheckpointError, match="nothing reads single experts"):
            export(tmp_path / "awq", tmp_path / "dense", "dense")
        return
    export(tmp_path / "awq", tmp_path / "dense", "dense")
    assert not any(name.endswith("qweight") for name in tensors_of(tmp_path / "dense"))
