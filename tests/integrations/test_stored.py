"""GPTQ, AutoRound and compressed-tensors models in transformers, without their packages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from other_layouts import folder_of, integers, stated
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from squawq.errors import CheckpointError
from squawq.export.run import export
from squawq.integrations import stored

IDS = torch.arange(2, 42).view(2, -1)
AUTOROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}


@pytest.fixture(autouse=True)
def no_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registered as on a machine that has none of them."""
    kept = dict(AUTO_QUANTIZATION_CONFIG_MAPPING), dict(AUTO_QUANTIZER_MAPPING)
    monkeypatch.setattr(stored, "find_spec", lambda _: None)
    stored.register()
    yield
    for table, old in zip((AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING), kept, strict=True):
        table.update(old)


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def folder(path: Path, layout: str, zero_point: bool = True, order: int = 0, **changes: Any) -> Path:
    drop = () if zero_point or layout != "pack-quantized" else ("weight_zero_point",)
    settings = {**stated(layout, 32, zero_point), **changes}
    return folder_of(path, layout, integers(32, zero_point), settings, order=order, drop=drop)


CASES: dict[str, dict[str, Any]] = {
    "gptq": {"layout": "gptq"},
    "act order": {"layout": "gptq", "order": 32},
    "gptq_v2": {"layout": "gptq_v2"},
    "compressed-tensors": {"layout": "pack-quantized"},
    "symmetric": {"layout": "pack-quantized", "zero_point": False},
    "autoround": {"layout": "gptq", **AUTOROUND, "packing_format": "auto_round:auto_gptq"},
    "autoround 2": {"layout": "gptq_v2", **AUTOROUND, "packing_format": "auto_round"},
    "autoround awq": {"layout": "gemm", **AUTOROUND, "packing_format": "auto_round:auto_awq"},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_of_the_dense_export(case: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "m", **CASES[case])
    export(source, tmp_path / "dense", "dense")
    expected = logits(tmp_path / "dense")
    assert (logits(source) - expected).norm() < 0.05 * expected.norm()


def test_transformers_own_stays_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    before = object()
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "gptq", before)
    monkeypatch.setattr(stored, "find_spec", lambda name: ModuleSpec(name, None))
    stored.register()
    assert AUTO_QUANTIZER_MAPPING["gptq"] is before


def test_a_tensor_that_does_not_fit(tmp_path: Path) -> None:
    source = folder(tmp_path / "m", "gptq")
    name = "model.layers.0.mlp.down_proj.qzeros"
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, name: tensors[name][:, :4].contiguous()}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is torch.int32.*is needed"):
        logits(source)


def test_experts(tmp_path: Path) -> None:
    """A mixture of experts in compressed-tensors, by our own export."""
    from transformers import AutoConfig

    from squawq.quant_config import QuantConfig
    from squawq.quantization.pipeline import quantize

    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
    raw = tiny_config("qwen3_moe", architectures=["Qwen3MoeForCausalLM"], **changes)
    model, config = tmp_path / "model", tmp_path / "config"
    config.mkdir()
    (config / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config)).save_pretrained(model)
    quantize(model, tmp_path / "awq", QuantConfig(group_size=32, method="rtn"))
    export(tmp_path / "awq", tmp_path / "dense", "dense")
    expected = logits(tmp_path / "dense")
    for form in ("compressed-tensors", "gptq"):
        export(tmp_path / "awq", tmp_path / form, form)
        assert (logits(tmp_path / form) - expected).norm() < 0.05 * expected.norm()
    export(tmp_path / "gptq", tmp_path / "back", "awq")
    shards = [
        load_file(shard) for where in ("awq", "back") for shard in sorted((tmp_path / where).glob("*.safetensors"))
    ]
    half = len(shards) // 2
    for one, other in zip(shards[:half], shards[half:], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
