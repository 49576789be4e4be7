"""Tiny configs of the families that llama.cpp runs: windows and original contexts are shorter than 60 tokens."""

from __future__ import annotations

from typing import Any

Case = tuple[str, dict[str, Any]]
BOTH = ["sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.0, 2.0, 3.0, 5.0, 8.0],
}
GEMMA3 = {"sliding_window": 8, "layer_types": BOTH, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}
QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
GROUPS = {"n_group": 4, "topk_group": 2}

LLAMA_LIKE: dict[str, Case] = {
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, 3.1": ("llama", {"rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "llama, linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama, yarn": ("llama", {"rope_scaling": {**YARN, "beta_fast": 8, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "mistral": ("mistral", {"sliding_window": 128}),
    "ministral": ("ministral", {"sliding_window": 128}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, yarn": ("qwen3", {"rope_scaling": YARN}),
    "seed_oss": ("seed_oss", {}),
    "helium": ("helium", {}),
    "cwm": ("cwm", {"sliding_window": 128, "layer_types": BOTH, "rope_scaling": LLAMA3}),
    "gemma": ("gemma", {"hidden_act": "gelu", "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "gemma3": (
        "gemma3_text",
        {**GEMMA3, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "gemma3, soft cap": ("gemma3_text", {**GEMMA3, "final_logit_softcapping": 3.0}),
    "ministral3": (
        "ministral3",
        {"rope_parameters": {**YARN, "rope_theta": 1e4, "llama_4_scaling_beta": 0.5, "mscale": 1.0}},
    ),
    "ministral3, beta alone": (
        "ministral3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "llama_4_scaling_beta": 0.5,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, long": (
        "phi3",
        {
            "sliding_window": None,
            "rope_scaling": LONG,
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 0.75,
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "olmo2": ("olmo2", {}),
    "olmo2, tied": ("olmo2", {"tie_word_embeddings": True}),
    "olmo3": ("olmo3", {"rope_theta": 5e5, "sliding_window": 8, "layer_types": BOTH, "rope_scaling": YARN}),
    "exaone4, no window": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "exaone4, 64 layers": (
        "exaone4",
        {"num_hidden_layers": 64, "sliding_window": 8, "layer_types": [*BOTH[:1] * 3, BOTH[1]] * 16},
    ),
    "granite": (
        "granite",
        {"embedding_multiplier": 6.0, "residual_multiplier": 0.3, "attention_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "glm": ("glm", {"attention_bias": True, "partial_rotary_factor": 0.5}),
    "glm4": ("glm4", {"partial_rotary_factor": 0.25}),
    "ernie4_5": ("ernie4_5", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"rope_scaling": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0}}),
}
EXPERTS: dict[str, Case] = {
    "qwen3_moe": ("qwen3_moe", {**QWEN_MOE, "norm_topk_prob": True}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**QWEN_MOE, "shared_expert_intermediate_size": 64}),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "dots1": ("dots1", {**DEEPSEEK, **GROUPS, "num_key_value_heads": 4}),
    "glm4_moe": ("glm4_moe", DEEPSEEK),
    "glm4_moe, norms": ("glm4_moe", {**DEEPSEEK, "use_qk_norm": True, "n_shared_experts": 1}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
    ),
    "minimax_m2": ("minimax_m2", {"num_local_experts": 6, "num_experts_per_tok": 2, "rotary_dim": 8}),
}
SHARED_HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": 32}
NESTED: dict[str, Case] = {  # by transformers' own class
    "qwen2_vl_text": ("qwen2_vl_text", {}),
    "qwen2_5_vl_text": ("qwen2_5_vl_text", {}),
    "qwen3_vl_text": ("qwen3_vl_text", {}),
    "qwen3_vl_moe_text": ("qwen3_vl_moe_text", {}),
    "qwen3_5_text": ("qwen3_5_text", {**SHARED_HEADS, "linear_key_head_dim": 32}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**SHARED_HEADS, "linear_key_head_dim": 32}),
    "qwen3_next": ("qwen3_next", {**SHARED_HEADS, "linear_key_head_dim": 32, "norm_topk_prob": True}),
}
CASES = LLAMA_LIKE | EXPERTS | NESTED
