"""What llama.cpp computes for each model_type: its name there, the parameters that it reads, and what it declines.

A parameter that llama.cpp would not read must have the value that it assumes; otherwise its output would be silently
wrong. Taken from llama.cpp's loaders and graphs. Knows nothing of tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from squawq.config import ModelConfig
from squawq.decoder_support import ACTIVATIONS
from squawq.delta_config import LINEAR
from squawq.errors import ConfigError
from squawq.rope_config import RopeConfig

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT = ("self_attn.o_proj",)
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose attention scale is 1 / sqrt(hidden / heads)


@dataclass(frozen=True)
class Architecture:
    """A model_type in llama.cpp.

    Attributes:
        name: general.architecture.
        neighbours: RoPE turns neighbours (2i, 2i + 1) instead of a head's two halves.
        biases: Linears that may have a bias.
        activation: Of the MLP, by a backend's name.
        free_heads: head_dim may differ from hidden / heads.
        grouped: Grouped-query attention is supported.
        head: Whether the output head is always the embedding ("tied"), may be ("either"), or is a tensor ("own").
        windows: Sliding windows are applied; otherwise the context length is limited to the window.
        window_rope: RoPE of layers with sliding windows: as elsewhere (""), with a "base" of its own and no scaling, or
            "plain", without the scaling.
        scaled_rope: How RoPE is scaled: by "keys" (linear, and YaRN with the usual beta), by one divisor for each
            "frequency" (all but linear), "two" lists for long and short contexts (LongRoPE), or "linear" alone.
        partial: Partial rotary embedding is supported.
        window_layers: Number of layers of the one size with sliding windows; its full attention has no RoPE (EXAONE 4).
        unrotated: Every n-th layer has no RoPE (NoPE); 0: all have it.
        factors: Granite's factors of embedding, scores, residuals and logits are read.
        sections: Multi-axis RoPE (M-RoPE); text has equal positions on all axes.
        renormalizes: The weights of a token's experts sum to 1; None: as a key says.
        leading: The first layers may have one MLP instead of experts.
    """

    name: str
    neighbours: bool = False
    biases: tuple[str, ...] = QKV
    activation: str = "silu"
    free_heads: bool = True
    grouped: bool = True
    head: Literal["tied", "either", "own"] = "either"
    windows: bool = False
    window_rope: Literal["", "base", "plain"] = ""
    scaled_rope: Literal["keys", "frequency", "two", "linear"] = "keys"
    partial: bool = True
    window_layers: int = 0
    unrotated: int = 0
    factors: bool = False
    sections: bool = False
    renormalizes: bool | None = None
    leading: bool = False


_LLAMA = Architecture("llama", True, QKV + OUT + MLP, scaled_rope="frequency", partial=False, renormalizes=True)
_GEMMA = Architecture("gemma", activation="gelu_tanh", head="tied")
ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "ministral", "cwm", "helium", "internlm3", "iquestcoder", "mixtral"), _LLAMA),
    "qwen2": Architecture("qwen2", free_heads=False),
    "qwen3": Architecture("qwen3"),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), Architecture("qwen2vl", free_heads=False, sections=True)),
    "qwen3_vl_text": Architecture("qwen3vl", sections=True),
    "seed_oss": Architecture("seed_oss"),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, name="gemma2", windows=True),
    "gemma3_text": replace(
        _GEMMA, name="gemma3", head="either", windows=True, window_rope="base", scaled_rope="linear"
    ),
    "ministral3": replace(_LLAMA, name="mistral3"),
    "phi3": Architecture("phi3", free_heads=False, biases=(), scaled_rope="two"),
    "smollm3": Architecture("smollm3", True, unrotated=4),
    **dict.fromkeys(
        ("olmo2", "olmo3"), Architecture("olmo2", free_heads=False, head="own", windows=True, window_rope="plain")
    ),
    "granite": replace(_LLAMA, name="granite", partial=True, factors=True),
    "glm": Architecture("chatglm", True),
    "glm4": Architecture("glm4", True),
    "exaone4": Architecture("exaone4", free_heads=False, scaled_rope="frequency", window_layers=64),
    "hunyuan_v1_dense": Architecture("hunyuan-dense"),
    "ernie4_5": Architecture("ernie4_5", True, QKV + OUT),
    "qwen3_moe": Architecture("qwen3moe", renormalizes=True),
    "qwen3_vl_moe_text": Architecture("qwen3vlmoe", sections=True, renormalizes=True),
    "qwen2_moe": Architecture("qwen2moe", free_heads=False, head="own", renormalizes=False),
    "olmoe": Architecture("olmoe", free_heads=False, grouped=False, head="own", renormalizes=False),
    "minimax_m2": Architecture("minimax-m2", head="own", renormalizes=True),
    "ernie4_5_moe": Architecture("ernie4_5-moe", True, QKV + OUT, renormalizes=True, leading=True),
    "glm4_moe": Architecture("glm4moe", leading=True),
    "dots1": Architecture("dots1", grouped=False, head="own", leading=True),
    "qwen3_next": Architecture("qwen3next", renormalizes=True),
    "qwen3_5_text": Architecture("qwen35", sections=True),
    "qwen3_5_moe_text": Architecture("qwen35moe", sections=True, renormalizes=True),
}


def architecture_of(config: ModelConfig) -> Architecture:
    """A model's row. Raises ConfigError for a model that llama.cpp would compute differently."""
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        raise ConfigError(
            f"model_type is {config.model_type!r}; GGUF takes {', '.join(sorted(ARCHITECTURES))}. Other engines take "
            "the model as compressed-tensors or gptq"
        )
    row = replace(row, windows=row.windows or config.num_layers == row.window_layers)
    if reason := _declines(config, row):
        raise ConfigError(f"llama.cpp's {row.name} does not compute this model: {reason}")
    return row


def _declines(config: ModelConfig, row: Architecture) -> str | None:
    if ACTIVATIONS.get(config.activation) != row.activation:
        return f"hidden_act is {config.activation!r}"
    if row.head == "tied" and not config.tied_embeddings:
        return "tie_word_embeddings is false"
    if not row.free_heads and config.num_heads * config.head_dim != config.hidden_size:
        return f"head_dim is {config.head_dim}"
    if not row.grouped and config.num_kv_heads != config.num_heads:
        return "num_key_value_heads and num_attention_heads differ"
    if not row.factors and not math.isclose(config.scales.attention, _implied_scale(config, row), rel_tol=1e-5):
        return "the attention scale differs from 1 / sqrt(head_dim) (query_pre_attn_scalar)"
    if row.name == "gemma2" and not (config.scales.attention_cap and config.scales.logits_cap):
        return "attn_logit_softcapping and final_logit_softcapping must be set"
    if row.window_layers == config.num_layers and config.sliding_window is None:
        return f"with {config.num_layers} layers it always has sliding windows, and sliding_window is null"
    return _declines_rope(config, row) or _declines_experts(config, row) or _declines_linear_attention(config)


def _implied_scale(config: ModelConfig, row: Architecture) -> float:
    """The factor of scores, which llama.cpp takes from sizes."""
    if config.num_layers == LARGEST.get(row.name):
        return 1 / math.sqrt(config.hidden_size // config.num_heads)
    return 1 / math.sqrt(config.head_dim)


def _declines_rope(config: ModelConfig, row: Architecture) -> str | None:
    rope, types = config.rope, _rope_types(row)
    if rope.type not in types:
        return f"rope type is {rope.type!r}, supported: {', '.join(types)}"
    usual = rope.truncate and (rope.beta_fast, rope.beta_slow) == (32.0, 1.0)
    if rope.type == "yarn" and row.scaled_rope == "keys" and not usual:
        return "YaRN has a beta_fast, beta_slow or truncate of its own"
    if rope.partial != 1 and not row.partial:
        return f"partial_rotary_factor is {rope.partial:g}"
    if rope.query_beta and row.name != "mistral3":
        return "llama_4_scaling_beta is set"
    rotated = _rotated(config, row)
    if [found is not None for found in config.ropes] != rotated:
        return "it applies RoPE to other layers than config.json says"
    for layer, found in enumerate(config.ropes):
        if found is not None and found != _expected_rope(config, row, layer):
            return f"the RoPE parameters of layer {layer} differ from those that it would use"
    return None


def _rope_types(row: Architecture) -> tuple[str, ...]:
    return {
        "linear": ("default", "linear"),
        "keys": ("default", "linear", "yarn"),
        "two": ("default", "longrope"),
        "frequency": ("default", "linear", "yarn", "llama3", "longrope"),
    }[row.scaled_rope]


def _rotated(config: ModelConfig, row: Architecture) -> list[bool]:
    """Which layers have RoPE in llama.cpp; layers of linear attention count as rotated."""
    if row.windows and row.window_layers and config.sliding_window is not None:
        return [config.window(layer) is not None for layer in range(config.num_layers)]
    every = row.unrotated or config.num_layers + 1
    return [(layer + 1) % every != 0 for layer in range(config.num_layers)]


def _expected_rope(config: ModelConfig, row: Architecture, layer: int) -> RopeConfig:
    """A layer's RoPE in llama.cpp, whose one set of parameters is that of full attention."""
    whole, found = config.rope, config.ropes[layer]
    if found is None or config.window(layer) is None or not row.window_rope:
        return whole
    return RopeConfig(theta=found.theta if row.window_rope == "base" else whole.theta, partial=whole.partial)


def _declines_experts(config: ModelConfig, row: Architecture) -> str | None:
    moe = config.moe
    if moe is None:
        return None
    if row.renormalizes is not None and moe.renormalize != row.renormalizes:
        return f"norm_topk_prob is {str(moe.renormalize).lower()}"
    if any(first and not second for first, second in pairwise(moe.layers)) or not (row.leading or moe.layers[0]):
        return "layers without experts are not its first ones"
    return None


def _declines_linear_attention(config: ModelConfig) -> str | None:
    """Every n-th layer must have full attention."""
    if config.delta_rule is None:
        return None
    if config.delta_rule.key_dim != config.delta_rule.value_dim:
        return "linear_key_head_dim and linear_value_head_dim differ"
    linear = [kind == LINEAR for kind in config.layer_types]
    every = interval(config)
    if linear != [(layer + 1) % every != 0 for layer in range(config.num_layers)]:
        return "full attention is not every n-th layer"
    return None


def interval(config: ModelConfig) -> int:
    """Every n-th layer has full attention."""
    return next((layer + 1 for layer, kind in enumerate(config.layer_types) if kind != LINEAR), config.num_layers + 1)


def context_length(config: ModelConfig, row: Architecture) -> int:
    """The positions, or the sliding window if shorter, where llama.cpp does not apply it."""
    windows = [] if row.windows else [config.window(layer) for layer in range(config.num_layers)]
    return min([config.max_positions, *(window for window in windows if window is not None)])
