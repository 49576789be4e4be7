"""Which models our decoder (`nn/`) runs, by their config.json and their family's row, and why it declines others."""

from __future__ import annotations

from squawq.config import ModelConfig
from squawq.decoder_traits import Traits
from squawq.delta_config import LINEAR
from squawq.errors import ConfigError
from squawq.families import FAMILIES, Family, family_of
from squawq.rope_config import ROPE_TYPES

ACTIVATIONS = {  # hidden_act of config.json, where our decoder has it -> a backend's name
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def traits_of(family: Family) -> Traits:
    """How our decoder computes a family. Raises ConfigError for one that it does not run."""
    if family.decoder is None:
        known = ", ".join(sorted(name for name, row in FAMILIES.items() if row.decoder))
        raise ConfigError(f"model_type is {family.model_type!r}; our decoder takes {known}")
    return family.decoder


def decoder_declines(config: ModelConfig) -> str | None:
    """Why our decoder does not run a model; None if it does. Raises ConfigError for a model_type without a row."""
    unlike = []
    if config.activation not in ACTIVATIONS:
        unlike.append(f"hidden_act is {config.activation!r}, and it has {', '.join(ACTIVATIONS)}")
    for rope in config.ropes:
        if rope is not None and rope.type not in ROPE_TYPES:
            unlike.append(f"rope type is {rope.type!r}, and it has {', '.join(ROPE_TYPES)}")
    if config.text.get("use_bidirectional_attention"):
        unlike.append("use_bidirectional_attention is set, and its attention is causal")
    known = {"full_attention", "sliding_attention", *([LINEAR] if config.delta_rule else [])}
    if others := set(config.layer_types) - known:
        unlike.append(f"a layer's attention is {sorted(others)[0]!r}")
    if config.delta_rule and (odd := [dim for dim in (config.head_dim, *config.delta_rule.dims) if dim % 8]):
        unlike.append(f"a head has {odd[0]} dimensions, which is no multiple of 8")
    if config.raw.get("clip_qkv") is not None:
        unlike.append("clip_qkv is set, and it does not clip queries, keys and values")
    if config.model_type in ("qwen2_moe", "qwen3_moe") and config.sliding_window is not None:
        unlike.append("use_sliding_window is true, and it has no windows of this family")
    if not family_of(config.model_type).decoder:
        unlike = [f"model_type is {config.model_type!r}"]
    return unlike[0] if unlike else None


def check_decoder(config: ModelConfig) -> None:
    """Raise ConfigError for a model that our decoder does not run."""
    if reason := decoder_declines(config):
        raise ConfigError(
            f"our decoder does not run this model ({reason}); squawq serve, generate, chat and LLM run it on "
            "transformers' model class"
        )
