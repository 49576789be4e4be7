"""Tiny AWQ folders, written from the format's description, each beside a dense folder of the dequantized weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from squawq.format.groupwise import quantize, to_gemm

EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
}
SETTINGS = {"quant_method": "awq", "bits": 4, "version": "gemm", "modules_to_not_convert": None}


def random_model(folder: Path, model_type: str, **changes: Any) -> dict[str, Any]:
    """A random float32 checkpoint in the Hub's names; gives its config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = tiny_config(model_type, **{**EXPERTS.get(model_type, {}), **changes})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    written: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return written


def quantized(
    tmp_path: Path, model_type: str = "llama", *, group: int = 32, zero_point: bool = True, zeros: bool = True,
    skip: tuple[str, ...] = (), **changes: Any,
) -> tuple[Path, Path]:  # fmt: skip
    """(AWQ folder, dense folder of what its integers say). skip: parts of names that stay dense; zeros False: no
    qzeros, as symmetric checkpoints may."""
    dense, awq = tmp_path / "dense", tmp_path / "awq"
    raw = random_model(dense, model_type, **changes)
    tensors = load_file(dense / "model.safetensors")
    packed: dict[str, Tensor] = {}
    for name, weight in tensors.items():
        linear = name.removesuffix(".weight")
        inside = re.search(r"\.layers\.", name) and weight.dim() == 2 and not linear.endswith(".gate")
        if not inside or any(part in name for part in skip):
            packed[name] = weight
            continue
        rounded = quantize(weight, weight.shape[1] if group == -1 else group, zero_point)
        gemm = to_gemm(rounded)
        packed |= {f"{linear}.{k}": t for k, t in gemm.items() if zeros or k != "qzeros"}
        tensors[name] = rounded.dequantize()
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    settings = {**SETTINGS, "group_size": group, "zero_point": zero_point, "modules_to_not_convert": list(skip) or None}
    write(awq, {**raw, "quantization_config": settings}, packed)
    return awq, dense


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
