"""What Qwen's hybrids have beside Llama's layers: linear attention by a gated delta rule, and gates of attention.

Checkpoints interleave what shares a head: queries and gates in q_proj; in Qwen3-Next also all inputs of a delta rule.
They are loaded in the order of the operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from squawq.backends.layer_ops import GatedDeltaRule
from squawq.config import ModelConfig
from squawq.delta_config import DeltaRuleConfig
from squawq.format.reader import Checkpoint
from squawq.nn.linears import Linear

IN, GATES, OUT = "linear_attn.in_proj", "linear_attn.gates", "linear_attn.out_proj"  # packed weights


def delta_shapes(config: ModelConfig, interleaved: bool) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the linears of linear attention.

    interleaved: They are two by key heads (Qwen3-Next), not four.
    """
    sizes, hidden = _sizes(config), config.hidden_size
    outputs = {"qkv": sizes.channels, "z": sizes.values, "b": sizes.value_heads, "a": sizes.value_heads}
    if interleaved:
        outputs = {"qkvz": sizes.channels + sizes.values, "ba": 2 * sizes.value_heads}
    return {f"linear_attn.in_proj_{name}": (out, hidden) for name, out in outputs.items()} | {
        OUT: (hidden, sizes.values)
    }


def delta_linears(config: ModelConfig, layer: str, interleaved: bool) -> dict[str, list[Linear]]:
    """The linears that make up each packed weight of linear attention in `layer`, a full name."""
    shapes = delta_shapes(config, interleaved)

    def linear(name: str, rows: Tensor | None = None) -> Linear:
        return Linear(f"{layer}.{name}", *shapes[name], rows=rows)

    def inputs(*names: str) -> list[Linear]:
        return [linear(f"linear_attn.in_proj_{name}") for name in names]

    if not interleaved:
        return {IN: inputs("qkv", "z"), GATES: inputs("b", "a"), OUT: [linear(OUT)]}
    sizes = _sizes(config)
    share = sizes.value_heads // sizes.key_heads
    values = share * sizes.value_dim
    qkvz = torch.cat(by_heads(sizes.key_heads, (sizes.key_dim, sizes.key_dim, values, values)))
    ba = torch.cat(by_heads(sizes.key_heads, (share, share)))
    return {
        IN: [linear("linear_attn.in_proj_qkvz", qkvz)],
        GATES: [linear("linear_attn.in_proj_ba", ba)],
        OUT: [linear(OUT)],
    }


def without_gates(config: ModelConfig, linears: Sequence[Linear]) -> tuple[list[Linear], list[Linear]]:
    """The queries of q_proj beside the other linears of attention, and its gates."""
    query, *others = linears
    queries, gates = by_heads(config.num_heads, (config.head_dim, config.head_dim))
    return [replace(query, rows=queries), *others], [replace(query, rows=gates)]


def by_heads(heads: int, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Outputs of a linear whose every head has parts of these sizes: int64, of each part those of all heads."""
    outputs = torch.arange(heads * sum(sizes)).view(heads, sum(sizes))
    return tuple(part.flatten() for part in torch.split(outputs, list(sizes), 1))


def load_delta_rule(checkpoint: Checkpoint, prefix: str, layer: int, device: torch.device) -> GatedDeltaRule:
    """The delta rule of one layer, without its linears. Raises CheckpointError for tensors that do not fit."""
    sizes = _sizes(checkpoint.config)

    def read(name: str, *shape: int) -> Tensor:
        return checkpoint.read(f"{prefix}.linear_attn.{name}", shape).to(device, torch.float32)

    return GatedDeltaRule(
        layer,
        sizes,
        convolution=read("conv1d.weight", sizes.channels, 1, sizes.kernel)[:, 0].T.contiguous(),
        rate=-read("A_log", sizes.value_heads).exp(),
        bias=read("dt_bias", sizes.value_heads),
        norm=read("norm.weight", sizes.value_dim),
    )


def _sizes(config: ModelConfig) -> DeltaRuleConfig:
    assert config.delta_rule is not None  # `check_decoder`
    return config.delta_rule
