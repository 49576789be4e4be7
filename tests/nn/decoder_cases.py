"""Tiny configs of the families that are unlike Llama: windows and original contexts are shorter than 40 tokens."""

from __future__ import annotations

from typing import Any

BOTH = ["sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1, 1, 2, 3, 5, 8.0]}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 8.0}
GEMMA3 = {"sliding_window": 8, "layer_types": BOTH, "query_pre_attn_scalar": 24}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", {"hidden_act": "gelu"}),
    "gemma2": ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {**GEMMA3, "rope_local_base_freq": 100.0, "rope_scaling": LINEAR}),
    "gemma3, transformers 5": (
        "gemma3_text",
        {
            **GEMMA3,
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            "final_logit_softcapping": 3.0,
        },
    ),
    "llama, yarn": ("llama", {"rope_scaling": YARN}),
    "qwen3, yarn": ("qwen3", {"rope_scaling": {**YARN, "truncate": False, "beta_fast": 8, "beta_slow": 2}}),
    "mistral, yarn": ("mistral", {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "seed_oss, yarn": ("seed_oss", {"rope_scaling": {**YARN, "attention_factor": 0.7}}),
    "ministral3": (
        "ministral3",
        {
            "rope_parameters": {
                **YARN,
                "rope_theta": 1e4,
                "llama_4_scaling_beta": 0.5,
                "mscale": 1.0,
            }
        },
    ),
    "phi3": ("phi3", {"sliding_window": 8}),
    "phi3, long": (
        "phi3",
        {"rope_scaling": LONG, "original_max_position_embeddings": 16, "partial_rotary_factor": 0.75},
    ),
    "phi3, short": (
        "phi3",
        {"rope_scaling": LONG, "original_max_position_embeddings": 256, "partial_rotary_factor": 0.75},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"rope_theta": 5e5, "sliding_window": 8, "layer_types": BOTH, "rope_scaling": YARN}),
    "exaone4": ("exaone4", {"sliding_window": 8, "layer_types": BOTH}),
    "exaone4, no window": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "granite": (
        "granite",
        {"embedding_multiplier": 6.0, "residual_multiplier": 0.3, "attention_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "glm": ("glm", {"attention_bias": True}),
    "glm4": ("glm4", {"partial_rotary_factor": 0.25}),
    "ernie4_5": ("ernie4_5", {}),
    "helium": ("helium", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"rope_scaling": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0}}),
    "cwm": ("cwm", {"sliding_window": 8, "layer_types": BOTH, "rope_scaling": LLAMA3}),
}
