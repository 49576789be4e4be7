"""Builds a decoder layer as a list of operations from its `Family` and the model's config."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from squawq.backends.layer_ops import (
    ActivationMul,
    AddResidual,
    AllReduce,
    Attention,
    Buffer,
    Matmul,
    Norm,
    Operation,
    Packed,
    RotateAndStore,
)
from squawq.config import ModelConfig
from squawq.families import Family, traits_of

QKV, OUT, GATE_UP, DOWN = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"
ACTIVATIONS = {"silu": "silu", "swish": "silu"}  # hidden_act of config.json -> a backend's name


def norm_sizes(config: ModelConfig, family: Family) -> dict[str, int]:
    """Names of a layer's norms, and the number of weights of each."""
    traits = traits_of(family)
    sizes = {name: config.hidden_size for name in traits.norms if name}
    return sizes | (dict.fromkeys(traits.qk_names, config.head_dim) if traits.qk_norm else {})


def layer_operations(
    config: ModelConfig,
    family: Family,
    index: int,
    linears: Mapping[str, Packed],
    norms: Mapping[str, Tensor],
    shared: bool = False,
) -> list[Operation]:
    """The operations of one layer. Every residual addition but the model's last is part of the norm that follows it.

    Args:
        linears: Packed weights, by the names QKV, OUT, GATE_UP and DOWN.
        norms: float32 weights, by the names of `norm_sizes`.
        shared: Other ranks have the rest of the linears (tensor parallelism).
    """
    summed = [AllReduce()] if shared else []
    traits = traits_of(family)
    before_attention, after_attention, before_mlp, after_mlp = traits.norms
    query_norm, key_norm = map(norms.get, traits.qk_names)
    return [
        Norm(norms[before_attention], add=index > 0),
        Matmul(linears[QKV], Buffer.NORMED, Buffer.WIDE),
        RotateAndStore(index, query_norm, key_norm),
        Attention(index, config.window(index)),
        Matmul(linears[OUT], Buffer.NARROW, Buffer.DELTA),
        *summed,
        *_after(after_attention, norms),
        Norm(norms[before_mlp]),
        Matmul(linears[GATE_UP], Buffer.NORMED, Buffer.WIDE),
        ActivationMul(ACTIVATIONS[config.activation]),
        Matmul(linears[DOWN], Buffer.NARROW, Buffer.DELTA),
        *summed,
        *_after(after_mlp, norms),
        *([AddResidual()] if index == config.num_layers - 1 else []),
    ]


def _after(name: str, norms: Mapping[str, Tensor]) -> list[Operation]:
    """The norm of attention's or the MLP's output before the residual addition, in families that have one."""
    return [Norm(norms[name], Buffer.DELTA, Buffer.DELTA, add=False)] if name else []
