"""GPTQ and AWQ: words by plain shifts, the settings of GPTQModel, and a text model within a larger one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from safetensors.torch import load_file
from torch import Tensor

from squawq.errors import CheckpointError
from squawq.export.gptq import Gptq
from squawq.export.run import export
from squawq.format.files import read_json
from squawq.format.groupwise import GroupwiseTensor
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: Path, other: Path) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_golden_words() -> None:
    """A word has inputs 0 to 7 of an output, or zeros of outputs 0 to 7; the first version stores zeros less one."""
    q = (torch.arange(64).view(8, 8) % 16).to(torch.uint8)
    tensor = GroupwiseTensor(q, torch.ones(8, 1).half(), torch.arange(8, dtype=torch.uint8).view(8, 1))
    made = Gptq(QuantConfig()).linear("x", tensor)
    assert made["qweight"].tolist() == [[0x76543210, 0xFEDCBA98 - 2**32] * 4]
    assert made["qzeros"].tolist() == [[0x76543210]]
    assert made["g_idx"].tolist() == [0] * 8
    symmetric = Gptq(QuantConfig(zero_point=False))
    eights = replace(tensor, zeros=torch.full_like(tensor.zeros, 8))
    assert symmetric.linear("x", eights)["qzeros"].tolist() == [[0x77777777]]
    with pytest.raises(CheckpointError, match="x: has zeros other than 8"):
        symmetric.linear("x", tensor)


@pytest.mark.parametrize(
    "settings",
    [{}, {"zero_point": False}, {"group_size": -1}, {"modules_to_not_convert": ("layers.0.self_attn.o_proj",)}],
)
def test_there_and_back(settings: dict[str, Any], make_model: MakeModel, tmp_path: Path) -> None:
    quantize(make_model(), tmp_path / "awq", QuantConfig(**{"group_size": 32, "method": "rtn", **settings}))
    export(tmp_path / "awq", tmp_path / "gptq", "gptq")
    export(tmp_path / "gptq", tmp_path / "back", "awq")
    same(tmp_path / "awq", tmp_path / "back")
    written = read_json(tmp_path / "gptq" / "config.json")["quantization_config"]
    assert read_json(tmp_path / "gptq" / "quantize_config.json") == written
    assert written["sym"] == (settings.get("zero_point") is False)
    assert (written["quant_method"], written["bits"], written["desc_act"], written["lm_head"]) == (
        "gptq",
        4,
        False,
        False,
    )
    assert written["checkpoint_format"] == ("gptq" if written["sym"] else "gptq_v2")
    assert written["group_size"] == settings.get("group_size", 32)
    patterns = [pattern.removeprefix("-:") for pattern in written.get("dynamic", {})]
    linears = ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "lm_head")
    skipped = [name for name in linears if any(re.match(pattern, name) for pattern in patterns)]
    assert skipped == (["model.layers.0.self_attn.o_proj"] if "modules_to_not_convert" in settings else [])
    back = read_json(tmp_path / "back" / "config.json")["quantization_config"]
    assert back["zero_point"] is True
    assert "lm_head" in back["modules_to_not_convert"]


def test_the_text_model_of_a_larger_one(tmp_path: Path) -> None:
    """Gemma 3 with its vision tower, which is copied and listed."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 160, "sliding_window": 16}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**text, "max_position_embeddings": 128, "pad_token_id": 0},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "awq", QuantConfig(group_size=32, method="rtn"))
    before = tensors(tmp_path / "awq")
    seen = {name for name in before if "vision_tower" in name}
    written = {}
    for form in ("gptq", "compressed-tensors"):
        export(tmp_path / "awq", tmp_path / form, form)
        found = tensors(tmp_path / form)
        assert seen
        assert all(torch.equal(found[name], before[name]) for name in seen)
        written[form] = read_json(tmp_path / form / "config.json")["quantization_config"]
        export(tmp_path / form, tmp_path / f"{form} back", "awq")
        same(tmp_path / "awq", tmp_path / f"{form} back")
    assert "re:.*vision_tower.*" in written["compressed-tensors"]["ignore"]
    assert "-:.*vision_tower.*" in written["gptq"]["dynamic"]
