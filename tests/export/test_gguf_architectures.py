"""What GGUF files of each family hold, and what is refused. Knows no llama.cpp; test_gguf_families.py asks it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeModel, tiny_config
from family_models import family_model
from gguf_cases import CASES, NESTED

from squawq.config import ModelConfig
from squawq.errors import ConfigError
from squawq.export.gguf import export_gguf
from squawq.export.gguf_architectures import architecture_of
from squawq.format.reader import Checkpoint
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize

gguf = pytest.importorskip("gguf", reason="needs the package gguf")
from test_gguf import read, with_tokenizer  # noqa: E402

QUANTIZED = (".qweight", ".qzeros", ".scales")


@pytest.mark.parametrize("case", CASES)
def test_every_number_of_a_family_is_in_the_file(case: str, make_model: MakeModel, tmp_path: Path) -> None:
    model_type, changes = CASES[case]
    source, folder = tmp_path / "model", tmp_path / "awq"
    if case in NESTED:
        family_model(model_type, source, **changes)
    else:
        make_model(model_type, **changes)
    quantize(source, folder, QuantConfig(method="rtn", group_size=32))
    export_gguf(with_tokenizer(folder), tmp_path / "model.gguf")
    _, tensors = read(tmp_path / "model.gguf")
    checkpoint = Checkpoint(folder)
    integers = sum(out * columns for out, columns in checkpoint.quantized_linears().values())
    others = sum(math.prod(info.shape) for name, info in checkpoint.tensors.items() if not name.endswith(QUANTIZED))
    found = [tensor.n_elements for tensor in tensors.values() if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1]
    assert sum(found) == integers > 0
    sizes = {name: int(tensor.n_elements) for name, tensor in tensors.items() if not name.startswith("rope_")}
    extra = sizes["output.weight"] if changes.get("tie_word_embeddings") and "output.weight" in sizes else 0
    assert sum(sizes.values()) - extra == integers + others


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "family": ("phi", {}, r"model_type is 'phi'; GGUF takes cwm, .* take the model as compressed-tensors or gptq"),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "rope type": ("qwen2", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope type is 'llama3'"),
    "yarn": (
        "qwen3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8}},
        "YaRN has a beta_fast",
    ),
    "partial": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "untied": ("gemma", {"hidden_act": "gelu"}, "tie_word_embeddings is false"),
    "scores": ("gemma2", {"query_pre_attn_scalar": 24, "tie_word_embeddings": True}, "query_pre_attn_scalar"),
    "cap of scores": (
        "gemma2",
        {"query_pre_attn_scalar": 16, "tie_word_embeddings": True, "attn_logit_softcapping": None},
        "softcapping must be set",
    ),
    "cap of logits": (
        "gemma2",
        {"query_pre_attn_scalar": 16, "tie_word_embeddings": True, "final_logit_softcapping": None},
        "softcapping must be set",
    ),
    "windows of one size": (
        "exaone4",
        {"num_hidden_layers": 64, "sliding_window": None, "layer_types": ["full_attention"] * 64},
        "always has sliding windows",
    ),
    "rope in windows": (
        "exaone4",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "applies RoPE to other layers",
    ),
    "no rope": ("smollm3", {"no_rope_layers": [1, 0]}, "applies RoPE to other layers"),
    "head size": ("qwen2", {"head_dim": 32}, "head_dim is 32"),
    "heads": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, "num_key_value_heads and num_attention_heads"),
    "weights": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": False},
        "norm_topk_prob is false",
    ),
    "dense layers": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
        "layers without experts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_otherwise(case: str) -> None:
    model_type, changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        architecture_of(ModelConfig.from_dict(tiny_config(model_type, **changes)))
