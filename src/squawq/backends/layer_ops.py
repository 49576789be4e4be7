"""Decoder layers as data: `nn/layers.py` builds a list of operations from a row of families.py, and a backend runs it.

A family with norms after attention, another activation or experts needs another list, but no other code.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from squawq.config import DeltaRuleConfig


class Packed:
    """A weight [out, in] and its bias, in the layout of the backend that packed it."""

    shape: tuple[int, int]


class Buffer(IntEnum):
    """The tensors that operations read and write, one row per token. csrc/layers.h has the same numbers."""

    HIDDEN = 0  # [rows, hidden_size]: the residual stream
    NORMED = 1  # [rows, hidden_size]: input of attention or MLP
    DELTA = 2  # [rows, hidden_size]: output of attention or MLP, to be added to HIDDEN
    WIDE = 3  # qkv [rows, (query + 2 kv heads) * head_dim]; then gate and up [rows, 2 * intermediate_size]
    NARROW = 4  # attention output [rows, query heads * head_dim]; then activation(gate) * up
    GATES = 5  # of the attention output [rows, query heads * head_dim]; or of a delta rule [rows, 2 * value heads]


@dataclass(frozen=True)
class Norm:
    """target = RMS norm of source times weight. add: HIDDEN += DELTA first. weight: float32 [hidden_size]."""

    weight: Tensor
    source: Buffer = Buffer.HIDDEN
    target: Buffer = Buffer.NORMED
    add: bool = True


@dataclass(frozen=True)
class Matmul:
    """target = source @ weight.T + bias."""

    weight: Packed
    source: Buffer
    target: Buffer


@dataclass(frozen=True)
class RotateAndStore:
    """Apply q_norm and k_norm (float32 [head_dim], or None) and RoPE in WIDE; write keys and values to the KV cache."""

    layer: int
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


@dataclass(frozen=True)
class Attention:
    """NARROW = causal attention of WIDE's queries over the cache. window: sliding window in tokens, or None."""

    layer: int
    window: int | None = None


@dataclass(frozen=True)
class OutputGate:
    """NARROW *= sigmoid(GATES)."""


@dataclass(frozen=True)
class GatedDeltaRule:
    """NARROW = gated delta rule of WIDE over the sequence's state, normed and gated. See `delta_rule.gated_delta_rule`.

    WIDE is queries, keys, values and z (the gate of the output); GATES is beta and the decay, before their activations.

    Attributes:
        layer: Whose place of the cache has the states.
        convolution: float32 [kernel, channels]; its last row is the current token's.
        rate: float32 [value_heads]; the decay is exp(rate * softplus(gate + bias)). Below 0: minus the exponential of
            A_log.
        bias: float32 [value_heads], dt_bias.
        norm: float32 [value_dim], weight of the RMS norm of each head's output.
    """

    layer: int
    sizes: DeltaRuleConfig
    convolution: Tensor
    rate: Tensor
    bias: Tensor
    norm: Tensor


@dataclass(frozen=True)
class ActivationMul:
    """NARROW = activation(gate) * up, where WIDE is [gate, up]. activation: one of `reference.ACTIVATIONS`."""

    activation: str = "silu"


@dataclass(frozen=True)
class MixtureOfExperts:
    """DELTA = for each row of NORMED, the sum over its top_k experts of topk_weight * down(activation(gate) * up).

    topk_weight: softmax of the router's logits [rows, experts] in float32; renormalize: the top_k then sum to 1.
    gate_up, down: one packed weight per expert.
    """

    router: Packed
    gate_up: tuple[Packed, ...]
    down: tuple[Packed, ...]
    top_k: int
    renormalize: bool
    activation: str = "silu"


@dataclass(frozen=True)
class AddResidual:
    """HIDDEN += DELTA: after the last layer, where no norm follows that would add it."""


@dataclass(frozen=True)
class AllReduce:
    """Tensor parallelism: DELTA becomes its sum over all ranks."""


Operation = (
    Norm
    | Matmul
    | RotateAndStore
    | Attention
    | OutputGate
    | GatedDeltaRule
    | ActivationMul
    | MixtureOfExperts
    | AddResidual
    | AllReduce
)
