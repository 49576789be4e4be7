"""Writes a model's parameters into a GGUF file: its keys, and the tensors that scale RoPE."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from squawq.config import ModelConfig
from squawq.errors import CheckpointError
from squawq.export.gguf_architectures import Architecture, context_length, interval
from squawq.nn.rope import inverse_frequencies


def rope_tensors(config: ModelConfig, row: Architecture) -> dict[str, Tensor]:
    """Divisors of the rotary frequencies by tensor, float32 [rotated pairs]; empty if metadata suffices."""
    rope = config.rope
    if rope.type in ("default", "linear") or row.scaled_rope == "keys":
        return {}
    if row.scaled_rope == "two":
        return {f"rope_factors_{length}.weight": _factors(config, f"{length}_factor") for length in ("long", "short")}
    plain = inverse_frequencies(replace(rope, type="default"), config.head_dim)
    return {"rope_freqs.weight": plain / inverse_frequencies(rope, config.head_dim)}


def _factors(config: ModelConfig, name: str) -> Tensor:
    """One of LongRoPE's two lists. Raises CheckpointError if its length differs from the active list's."""
    values = {**(config.text.get("rope_scaling") or {}), **(config.text.get("rope_parameters") or {})}.get(name)
    if not isinstance(values, list) or len(values) != len(config.rope.factors):
        raise CheckpointError(f"{name} must be a list of {len(config.rope.factors)} numbers")
    if not all(isinstance(value, int | float) and 0 < value < math.inf for value in values):
        raise CheckpointError(f"{name} must be a list of positive numbers")
    return torch.tensor(values, dtype=torch.float32)


def describe(writer: Any, config: ModelConfig, row: Architecture) -> None:
    """Write the model's parameters with a GGUFWriter."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config, row))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    _describe_rope(writer, config, row)
    _describe_scales(writer, config, row)
    if row.windows and config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if config.moe is not None:
        _describe_experts(writer, config)
    if config.delta_rule is not None:
        _describe_delta_rule(writer, config)


def _describe_rope(writer: Any, config: ModelConfig, row: Architecture) -> None:
    import gguf

    rope = config.rope
    writer.add_rope_dimension_count(2 * rope.pairs(config.head_dim))
    writer.add_rope_freq_base(rope.theta)
    window = next((found for i, found in enumerate(config.ropes) if found and config.window(i)), None)
    if row.window_rope == "base" and window is not None:
        writer.add_rope_freq_base_swa(window.theta)
    magnitude = rope.magnitude
    if rope.type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    elif rope.type == "yarn" and row.scaled_rope == "keys":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        magnitude /= 1 + 0.1 * math.log(max(rope.factor, 1.0))  # llama.cpp multiplies by this itself
    elif row.scaled_rope == "two" and rope.type == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    if rope.type in ("yarn", "longrope") or rope.query_beta or row.name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(min(rope.original_max_position_embeddings, config.max_positions))
    if magnitude != 1:
        writer.add_rope_scaling_attn_factors(magnitude)
    if rope.query_beta:
        writer.add_attn_temperature_scale(rope.query_beta)
    if row.sections:
        writer.add_rope_dimension_sections(_sections(config))


def _sections(config: ModelConfig) -> list[int]:
    """Rotated pairs of each axis: time, height, width and one that text does not have."""
    scaling = {**(config.text.get("rope_scaling") or {}), **(config.text.get("rope_parameters") or {})}
    pairs, given = config.rope.pairs(config.head_dim), scaling.get("mrope_section")
    if isinstance(given, list) and all(isinstance(size, int) and size > 0 for size in given) and sum(given) == pairs:
        return [*given, 0, 0, 0][:4]
    return [*((pairs + 2 - axis) // 3 for axis in range(3)), 0]


def _describe_scales(writer: Any, config: ModelConfig, row: Architecture) -> None:
    scales = config.scales
    if row.factors:
        writer.add_attention_scale(scales.attention)
        writer.add_embedding_scale(scales.embedding)
        writer.add_residual_scale(scales.residual)
        writer.add_logit_scale(1 / scales.logits)
    if row.name == "gemma2":
        writer.add_attn_logit_softcapping(scales.attention_cap)
    if scales.logits_cap:
        writer.add_final_logit_softcapping(scales.logits_cap)


def _describe_experts(writer: Any, config: ModelConfig) -> None:
    import gguf

    moe = config.moe
    assert moe is not None
    gating = gguf.ExpertGatingFuncType
    writer.add_expert_count(moe.experts)
    writer.add_expert_used_count(moe.top_k)
    writer.add_expert_feed_forward_length(moe.inner)
    writer.add_expert_gating_func(gating.SIGMOID if moe.scoring == "sigmoid" else gating.SOFTMAX)
    writer.add_expert_weights_norm(moe.renormalize)
    writer.add_expert_weights_scale(moe.scale)
    writer.add_leading_dense_block_count(moe.layers.index(True) if any(moe.layers) else config.num_layers)
    writer.add_interleave_moe_layer_step(1)
    writer.add_expert_shared_count(moe.shared_inner // moe.inner)
    if moe.shared:
        writer.add_expert_shared_feed_forward_length(moe.shared_inner)
    if moe.groups > 1:
        writer.add_expert_group_count(moe.groups)
        writer.add_expert_group_used_count(moe.top_groups)


def _describe_delta_rule(writer: Any, config: ModelConfig) -> None:
    sizes = config.delta_rule
    assert sizes is not None
    writer.add_ssm_conv_kernel(sizes.kernel)
    writer.add_ssm_state_size(sizes.key_dim)
    writer.add_ssm_group_count(sizes.key_heads)
    writer.add_ssm_time_step_rank(sizes.value_heads)
    writer.add_ssm_inner_size(sizes.values)
    writer.add_full_attention_interval(interval(config))
