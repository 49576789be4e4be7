"""Builds a decoder layer as a list of operations from its `Family` and the model's config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from squawq.backends.layer_ops import (
    ActivationMul,
    AddResidual,
    AllReduce,
    Attention,
    Buffer,
    GatedDeltaRule,
    Matmul,
    Norm,
    Operation,
    OutputGate,
    Packed,
    RotateAndStore,
)
from squawq.config import ModelConfig
from squawq.decoder_support import ACTIVATIONS, traits_of
from squawq.decoder_traits import Traits
from squawq.delta_config import LINEAR
from squawq.families import Family
from squawq.nn import delta_rule
from squawq.nn.rope import RotaryTable

QKV, OUT, GATE_UP, DOWN = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"
GATE = "self_attn.gate_proj"  # of the output, where q_proj has one


def is_linear(config: ModelConfig, index: int) -> bool:
    """Whether a layer has linear attention."""
    return config.layer_types[index] == LINEAR


def norm_sizes(config: ModelConfig, family: Family, index: int) -> dict[str, int]:
    """Names of a layer's norms, and the number of weights of each."""
    traits = traits_of(family)
    sizes = {name: config.hidden_size for name in traits.norms if name}
    heads = (config.num_heads, config.num_kv_heads) if traits.qk_norm == "whole" else (1, 1)
    if traits.qk_norm and (not traits.qk_flag or config.text.get(traits.qk_flag)) and not is_linear(config, index):
        sizes |= {name: count * config.head_dim for name, count in zip(traits.qk_names, heads, strict=True)}
    return sizes


def layer_operations(
    config: ModelConfig,
    family: Family,
    index: int,
    linears: Mapping[str, Packed],
    norms: Mapping[str, Tensor],
    mlp: Sequence[Operation] | None = None,
    shared: bool = False,
    rule: GatedDeltaRule | None = None,
) -> list[Operation]:
    """The operations of one layer. Every residual addition but the model's last is part of the norm that follows it.

    Args:
        linears: Packed weights, by the names QKV, GATE, OUT, GATE_UP and DOWN, and those of `delta_rule`.
        norms: float32 weights, by the names of `norm_sizes`.
        mlp: From NORMED to DELTA, in place of GATE_UP and DOWN.
        shared: Other ranks have the rest of the linears (tensor parallelism).
        rule: Of a layer with linear attention.
    """
    traits = traits_of(family)
    summed = [AllReduce()] if shared else []
    before_attention, after_attention, before_mlp, after_mlp = traits.norms
    attended, source = _before(before_attention, norms, pending=index > 0)
    multiplied, mlp_source = _before(before_mlp, norms)
    if rule is None:
        mixed = _attention(config, traits, index, linears, norms, source)
    else:
        mixed = _linear_attention(rule, linears, source)
    return [
        *attended,
        *mixed,
        *summed,
        *_after(after_attention, norms),
        *multiplied,
        *(_gated(config, linears, mlp_source) if mlp is None else mlp),
        *summed,
        *_after(after_mlp, norms),
        *([AddResidual()] if index == config.num_layers - 1 else []),
    ]


def _attention(
    config: ModelConfig,
    traits: Traits,
    index: int,
    linears: Mapping[str, Packed],
    norms: Mapping[str, Tensor],
    source: Buffer,
) -> list[Operation]:
    """Attention, from `source` to DELTA."""
    return [
        Matmul(linears[QKV], source, Buffer.WIDE),
        *([Matmul(linears[GATE], source, Buffer.GATES)] if traits.gated else []),
        rotate_and_store(config, traits, index, norms),
        attention(config, index),
        *([OutputGate()] if traits.gated else []),
        Matmul(linears[OUT], Buffer.NARROW, Buffer.DELTA),
    ]


def _linear_attention(rule: GatedDeltaRule, linears: Mapping[str, Packed], source: Buffer) -> list[Operation]:
    """Linear attention, from `source` to DELTA."""
    return [
        Matmul(linears[delta_rule.IN], source, Buffer.WIDE),
        Matmul(linears[delta_rule.GATES], source, Buffer.GATES),
        rule,
        Matmul(linears[delta_rule.OUT], Buffer.NARROW, Buffer.DELTA),
    ]


def rotate_and_store(config: ModelConfig, traits: Traits, index: int, norms: Mapping[str, Tensor]) -> RotateAndStore:
    """Norms and RoPE of a layer's queries and keys."""
    rope = config.ropes[index]
    query_norm, key_norm = map(norms.get, traits.qk_names)
    return RotateAndStore(
        index,
        query_norm,
        key_norm,
        whole=traits.qk_norm == "whole",
        rope_first=traits.rope_first,
        first=RotaryTable(config.ropes, config.head_dim).first(rope),
        pairs=0 if rope is None else rope.pairs(config.head_dim),
        interleaved=traits.interleaved,
    )


def attention(config: ModelConfig, index: int) -> Attention:
    """A layer's attention over the cache."""
    rope, scales = config.ropes[index], config.scales
    beta, original = (0.0, 1) if rope is None else (rope.query_beta, rope.original_max_position_embeddings)
    return Attention(index, config.window(index), scales.attention, scales.attention_cap, beta, original)


def _before(name: str, norms: Mapping[str, Tensor], pending: bool = True) -> tuple[list[Operation], Buffer]:
    """The norm before attention or the MLP, in families that have one, and the buffer to read then.

    pending: DELTA is still to be added to the residual stream.
    """
    if name:
        return [Norm(norms[name], add=pending)], Buffer.NORMED
    return [AddResidual()] if pending else [], Buffer.HIDDEN


def _gated(config: ModelConfig, linears: Mapping[str, Packed], source: Buffer) -> list[Operation]:
    """down(activation(gate) * up)."""
    return [
        Matmul(linears[GATE_UP], source, Buffer.WIDE),
        ActivationMul(ACTIVATIONS[config.activation]),
        Matmul(linears[DOWN], Buffer.NARROW, Buffer.DELTA),
    ]


def _after(name: str, norms: Mapping[str, Tensor]) -> list[Operation]:
    """The norm of attention's or the MLP's output before the residual addition, in families that have one."""
    return [Norm(norms[name], Buffer.DELTA, Buffer.DELTA, add=False)] if name else []
