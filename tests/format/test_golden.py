"""A linear as llm-compressor, GPTQModel and AutoRound write it: squawq reads the weight that they dequantize.

tools/golden_formats.py makes the files.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file

from squawq.format.reader import Checkpoint

GOLDEN = Path(__file__).with_name("golden")
LINEAR, OUT, INPUTS = "model.layers.0.self_attn.k_proj", 32, 64
NAMES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


def checkpoint(name: str, folder: Path) -> tuple[Checkpoint, torch.Tensor]:
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    weight = tensors.pop("dequantized")
    settings = json.loads((GOLDEN / f"{name}.json").read_text())
    (folder / "config.json").write_text(json.dumps(tiny_config(quantization_config=settings)))
    save_file({f"{LINEAR}.{part}": tensor for part, tensor in tensors.items()}, folder / "model.safetensors")
    return Checkpoint(folder), weight


@pytest.mark.parametrize("name", NAMES)
def test_their_weight(name: str, tmp_path: Path) -> None:
    found, weight = checkpoint(name, tmp_path)
    assert found.quantized_linears() == {LINEAR: (OUT, INPUTS)}
    assert torch.equal(found.read_weight(LINEAR, INPUTS, OUT).to(weight.dtype), weight)


def test_every_tool_and_an_order(tmp_path: Path) -> None:
    assert {name.partition("-")[0] for name in NAMES} == {"autoround", "gptqmodel", "llmcompressor"}
    assert checkpoint("gptqmodel-order", tmp_path)[0].input_order(LINEAR, INPUTS) is not None
