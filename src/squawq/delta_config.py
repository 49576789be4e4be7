"""The linear attention of Qwen's hybrids in config.json, for families whose layers have a gated delta rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from squawq.config_values import whole
from squawq.errors import CheckpointError

LINEAR = "linear_attention"  # the layer type with a delta rule
DELTA_RULE = ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
SIZES = {  # with transformers' defaults, and what is the most
    "linear_num_key_heads": (16, 2**10),
    "linear_num_value_heads": (32, 2**10),
    "linear_key_head_dim": (128, 2**10),
    "linear_value_head_dim": (128, 2**10),
    "linear_conv_kernel_dim": (4, 16),
}


@dataclass(frozen=True)
class DeltaRuleConfig:
    """Sizes of a gated delta rule (Yang et al., arXiv 2412.06464), the attention of `linear_attention` layers.

    `kernel`: tokens of the causal convolution over queries, keys and values.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values of all heads."""
        return 2 * self.key_heads * self.key_dim + self.values

    @property
    def dims(self) -> tuple[int, int]:
        """Of a key and of a value."""
        return self.key_dim, self.value_dim

    @property
    def values(self) -> int:
        """Values of all heads."""
        return self.value_heads * self.value_dim

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What a layer keeps of a sequence: the convolution's latest inputs, and each head's recurrent state."""
        return (self.kernel - 1, self.channels), (self.value_heads, self.key_dim, self.value_dim)


def read_delta_rule(raw: Mapping[str, Any], where: str) -> DeltaRuleConfig | None:
    """None for other families. Raises CheckpointError naming `where` and the key."""
    if raw.get("model_type") not in DELTA_RULE:
        return None
    values = []
    for key, (default, most) in SIZES.items():
        values.append(whole(key, raw.get(key, default), 1, where))
        if values[-1] > most:
            raise CheckpointError(f"{where}: {key} is {values[-1]}; it must be a whole number from 1 up to {most}")
    found = DeltaRuleConfig(*values)
    if found.value_heads % found.key_heads:
        raise CheckpointError(f"{where}: {found.value_heads} value heads cannot share {found.key_heads} key heads")
    return found


def hybrid_layers(raw: Mapping[str, Any], layers: int, where: str) -> tuple[str, ...]:
    """The attention of each layer, where config.json does not list it. Raises CheckpointError."""
    every = whole("full_attention_interval", raw.get("full_attention_interval", 4), 1, where)
    return tuple(LINEAR if (index + 1) % every else "full_attention" for index in range(layers))
