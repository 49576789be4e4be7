"""What Qwen's hybrids have beside Llama's layers: linear attention by a gated delta rule, and gates of attention.

Checkpoints interleave what shares a head: queries and gates in q_proj; in Qwen3-Next also all inputs of a delta rule.
They are loaded in the order of the operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from squawq.backends.layer_ops import GatedDeltaRule
from squawq.config import ModelConfig
from squawq.delta_config import DeltaRuleConfig
from squawq.format.reader import Checkpoint

IN, GATES, OUT = "linear_attn.in_proj", "linear_attn.gates", "linear_attn.out_proj"  # packed weights
# A checkpoint's linear, and which of its outputs in which order; None: all as they are
Piece = tuple[str, Tensor | None]


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


def delta_pieces(config: ModelConfig, interleaved: bool) -> dict[str, tuple[Piece, ...]]:
    """The pieces that make up each packed weight of linear attention."""
    if not interleaved:
        parts = {IN: ("qkv", "z"), GATES: ("b", "a")}
        pieces: dict[str, tuple[Piece, ...]] = {OUT: ((OUT, None),)}
        for name, found in parts.items():
            pieces[name] = tuple((f"linear_attn.in_proj_{part}", None) for part in found)
        return pieces
    sizes = _sizes(config)
    share = sizes.value_heads // sizes.key_heads
    values = share * sizes.value_dim
    inputs = by_heads(sizes.key_heads, (sizes.key_dim, sizes.key_dim, values, values))
    return {
        IN: (("linear_attn.in_proj_qkvz", torch.cat(inputs)),),
        GATES: (("linear_attn.in_proj_ba", torch.cat(by_heads(sizes.key_heads, (share, share)))),),
        OUT: ((OUT, None),),
    }


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
