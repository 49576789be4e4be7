"""Tiny random models of every family, by transformers' own classes, and their AWQ folders made dense again."""

from __future__ import annotations

import json
import re
import shutil
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from squawq.families import FAMILIES, Family
from squawq.format.groupwise import from_gemm

VOCABULARY = 160
SIZES: dict[str, Any] = {  # under every name that some config has for them
    **dict.fromkeys(("hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "sliding_window"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "n_group", "interleave_moe_layer_step"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "n_shared_experts", "moe_num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"), 1),
    **dict.fromkeys(("topk_group", "decoder_sparse_step", "bos_token_id", "eos_token_id"), 1),
    "num_hidden_layers": 2,
    "residual_multiplier": 0.5,
    "linear_num_value_heads": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
PER_LAYER: dict[str, Any] = {  # Gemma 4 E2B and E4B: per-layer inputs, shared keys and values, wide MLPs there
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "enable_moe_block": False,
    "attention_k_eq_v": False,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
VARIANTS = {"gemma4_text per layer": PER_LAYER}  # of a row, after its name
CASES = sorted([*FAMILIES, *VARIANTS])


def row_of(case: str) -> Family:
    """The row of a case."""
    return FAMILIES[case.split()[0]]


def family_model(case: str, folder: Path, **changes: Any) -> Any:
    """Make a model with small layers, mostly two, save it as transformers does, and return it in float32."""
    from transformers import CONFIG_MAPPING

    from squawq.layerwise.text_models import causal_lm

    model_type, changes = row_of(case).model_type, {**VARIANTS.get(case, {}), **changes}
    kind = CONFIG_MAPPING[model_type]
    known = {*signature(kind).parameters, *getattr(kind, "attribute_map", {})}
    sizes = {name: value for name, value in {**SIZES, **changes}.items() if name in known}
    if "linear_num_key_heads" in sizes:
        sizes["layer_types"] = ["linear_attention", "full_attention"]
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if model_type == "gemma4_text":
        sizes |= {"hidden_size_per_layer_input": 0, "enable_moe_block": True, "top_k_experts": 2}
        sizes |= {"attention_k_eq_v": True, "layer_types": ["sliding_attention", "full_attention"], **changes}
    if "_vl_" in model_type:
        sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
    torch.manual_seed(0)
    model = causal_lm(kind(**sizes)).eval()
    randomize(model, FAMILIES[model_type].norm_offset)
    model.save_pretrained(folder)
    return model


def randomize(model: Any, norm_offset: float) -> None:
    """Weights large enough that what is wrong shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and name.endswith(".weight")
            spread = 0.1 if parameter.dim() == 1 else 0.2
            parameter.normal_(1 - norm_offset if is_norm else 0, spread)
            if "per_layer" in name or "embed_tokens" in name:  # as it is stored: layers read what it gives
                parameter.copy_(parameter.half())


def linear_names(model: Any, layer: int) -> set[str]:
    """Every linear of a layer, each expert's included, relative to the layer; routers are no linears here."""
    decoder = model.get_submodule(f"{FAMILIES[model.config.model_type].layers}.{layer}")
    names = {name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    spelling = FAMILIES[model.config.model_type].experts
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 3 and name.endswith("experts.down_proj"):
            path = name.removesuffix("down_proj")
            names |= {f"{path}{expert}.{linear}" for expert in range(len(parameter)) for linear in spelling}
    return names


def dense_folder(awq: Path, source: Path, out: Path) -> Path:
    """The AWQ folder with the weights that its integers stand for, as transformers reads a 16-bit model."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(awq.glob("*.safetensors")):
        tensors |= load_file(file)
    for name in [name for name in tensors if name.endswith(".qweight")]:
        base = name.removesuffix("qweight")
        parts = [tensors.pop(base + part) for part in ("qweight", "scales", "qzeros")]
        tensors[f"{base}weight"] = from_gemm(*parts).dequantize()
    for fused, tensor in _fused(source).items():
        parent = re.sub(r"\.\w+(\.weight)?$", "", fused).removesuffix(".experts")
        of = re.compile(re.escape(parent) + r"\.experts\.(\d+)\.(\w+)\.weight")
        found = {(int(m[1]), m[2]): tensors[name] for name in tensors if (m := of.fullmatch(name))}
        gate, up, down = ("gate_proj", "up_proj", "down_proj") if (0, "up_proj") in found else ("w1", "w3", "w2")
        wanted = (down,) if re.search("down_proj|output", fused) else (gate, up)
        stack = torch.stack([torch.cat([found[e, part] for part in wanted]) for e in range(len(tensor))])
        if f"{fused}_bias" in load_file(source / "model.safetensors"):  # gpt-oss: gate and up alternate
            bias = [[tensors[f"{parent}.experts.{e}.{part}.bias"] for part in wanted] for e in range(len(tensor))]
            tensors[f"{fused}_bias"] = torch.stack([torch.stack(each, -1).flatten() for each in bias])
            each = [torch.stack([found[e, part] for part in wanted], 1).flatten(0, 1) for e in range(len(tensor))]
            stack = torch.stack(each)
        turned = any(name in str(source) for name in ("llama4", "gpt_oss"))
        tensors[fused] = stack if stack.shape == tensor.shape and not turned else stack.transpose(1, 2)
    for name in [n for n in tensors if re.search(r"experts\.\d+\.", n) and _fused(source)]:
        del tensors[name]
    out.mkdir()
    save_file({n: t.float().contiguous() for n, t in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    config = json.loads((awq / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    if (awq / "generation_config.json").is_file():
        shutil.copy(awq / "generation_config.json", out)
    return out


def _fused(source: Path) -> dict[str, torch.Tensor]:
    """What holds all experts of a layer in the 16-bit folder."""
    tensors = load_file(source / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if tensor.dim() == 3 and "conv1d" not in name}
