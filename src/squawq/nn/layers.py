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
from squawq.config import LINEAR, ModelConfig
from squawq.families import Family, Traits, traits_of
from squawq.nn import delta_rule

QKV, OUT, GATE_UP, DOWN = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"
GATE = "self_attn.gate_proj"  # of the output, where q_proj has one
ACTIVATIONS = {"silu": "silu", "swish": "silu"}  # hidden_act of config.json -> a backend's name


def is_linear(config: ModelConfig, index: int) -> bool:
    """Whether a layer has linear attention."""
    return config.layer_types[index] == LINEAR


def norm_sizes(config: ModelConfig, family: Family, index: int) -> dict[str, int]:
    """Names of a layer's norms, and the number of weights of each."""
    traits = traits_of(family)
    sizes = {name: config.hidden_size for name in traits.norms if name}
    return sizes | (
        dict.fromkeys(traits.qk_names, config.head_dim) if traits.qk_norm and not is_linear(config, index) else {}
    )


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
    summed = [AllReduce()] if shared else []
    traits = traits_of(family)
    before_attention, after_attention, before_mlp, after_mlp = traits.norms
    mixed = attention(config, traits, index, linears, norms) if rule is None else linear_attention(rule, linears)
    return [
        Norm(norms[before_attention], add=index > 0),
        *mixed,
        *summed,
        *_after(after_attention, norms),
        Norm(norms[before_mlp]),
        *(_gated(config, linears) if mlp is None else mlp),
        *summed,
        *_after(after_mlp, norms),
        *([AddResidual()] if index == config.num_layers - 1 else []),
    ]


def attention(
    config: ModelConfig, traits: Traits, index: int, linears: Mapping[str, Packed], norms: Mapping[str, Tensor]
) -> list[Operation]:
    """From NORMED to DELTA."""
    query_norm, key_norm = map(norms.get, traits.qk_names)
    return [
        Matmul(linears[QKV], Buffer.NORMED, Buffer.WIDE),
        *([Matmul(linears[GATE], Buffer.NORMED, Buffer.GATES)] if traits.gated else []),
        RotateAndStore(index, query_norm, key_norm),
        Attention(index, config.window(index)),
        *([OutputGate()] if traits.gated else []),
        Matmul(linears[OUT], Buffer.NARROW, Buffer.DELTA),
    ]


def linear_attention(rule: GatedDeltaRule, linears: Mapping[str, Packed]) -> list[Operation]:
    """From NORMED to DELTA."""
    return [
        Matmul(linears[delta_rule.IN], Buffer.NORMED, Buffer.WIDE),
        Matmul(linears[delta_rule.GATES], Buffer.NORMED, Buffer.GATES),
        rule,
        Matmul(linears[delta_rule.OUT], Buffer.NARROW, Buffer.DELTA),
    ]


def _gated(config: ModelConfig, linears: Mapping[str, Packed]) -> list[Operation]:
    """down(activation(gate) * up)."""
    return [
        Matmul(linears[GATE_UP], Buffer.NORMED, Buffer.WIDE),
        ActivationMul(ACTIVATIONS[config.activation]),
        Matmul(linears[DOWN], Buffer.NARROW, Buffer.DELTA),
    ]


def _after(name: str, norms: Mapping[str, Tensor]) -> list[Operation]:
    """The norm of attention's or the MLP's output before the residual addition, in families that have one."""
    return [Norm(norms[name], Buffer.DELTA, Buffer.DELTA, add=False)] if name else []
