"""Decoder layers as data: `nn/layers.py` builds a list of operations from a row of families.py, and a backend runs it.

A family with norms after attention, another activation or experts needs another list, but no other code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from torch import Tensor


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
    """Apply q_norm and k_norm and RoPE in WIDE; write keys and values to the KV cache.

    Attributes:
        query_norm, key_norm: float32 [head_dim], or None.
        whole: The norms are of all heads together: float32 [heads * head_dim].
        rope_first: They come after RoPE.
        first, pairs: Columns of the step's cos and sin that are this layer's: one for each rotated pair of a head. 0
            pairs: no RoPE (NoPE); None: all columns.
        interleaved: RoPE turns neighbours (2i, 2i + 1) instead of the two halves of a head's rotated part.
    """

    layer: int
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    whole: bool = False
    rope_first: bool = False
    first: int = 0
    pairs: int | None = None
    interleaved: bool = False

    def columns(self, rotary: Tensor) -> Tensor:
        """This layer's columns of cos or sin."""
        return rotary[:, self.first :] if self.pairs is None else rotary[:, self.first : self.first + self.pairs]


@dataclass(frozen=True)
class Attention:
    """NARROW = causal attention of WIDE's queries over the cache.

    Attributes:
        window: Sliding window in tokens, or None.
        scale: Of scores; None: 1 / sqrt(head_dim).
        cap: Scores become cap * tanh(score / cap), as in Gemma 2; 0: they stay.
        beta, original: Scores are multiplied by 1 + beta * log(1 + floor(position / original)), as in Llama 4.
    """

    layer: int
    window: int | None = None
    scale: float | None = None
    cap: float = 0.0
    beta: float = 0.0
    original: int = 1

    def scale_of(self, head_dim: int) -> float:
        """The factor of scores."""
        return 1 / math.sqrt(head_dim) if self.scale is None else self.scale


@dataclass(frozen=True)
class ActivationMul:
    """NARROW = activation(gate) * up, where WIDE is [gate, up]. activation: one of `reference.ACTIVATIONS`."""

    activation: str = "silu"


@dataclass(frozen=True)
class Routing:
    """How a row chooses experts by the router's logits, in float32.

    Attributes:
        experts: Number of experts.
        top_k: Experts of a row: those with the largest scores, or scores + bias.
        scoring: Scores are the softmax of the logits, or each logit's sigmoid.
        renormalize: Divide the top_k weights by their sum.
        bias: float32 [experts], added to the scores to choose, not to weigh (DeepSeek-V3's e_score_correction_bias).
        groups: Equal groups of neighbouring experts; only those of the `top_groups` groups with the largest sums of two
            scores are chosen (DeepSeek-V3, arXiv 2412.19437).
        scale: Factor of the weights.
    """

    experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = False
    bias: Tensor | None = None
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0


@dataclass(frozen=True)
class MixtureOfExperts:
    """DELTA = for each row of NORMED, the sum over its top_k experts of topk_weight * down(activation(gate) * up).

    The experts are stacked along the outputs: gate_up [experts * 2 * inner, hidden], an expert's gate before its up,
    and down [experts * hidden, inner], both without bias. shared: "added", DELTA already holds the output of the shared
    expert, to which the sum is added; "gated", it is first multiplied by the sigmoid of the router's last output, which
    belongs to no expert.
    """

    router: Packed
    gate_up: Packed
    down: Packed
    routing: Routing
    shared: Literal["", "added", "gated"] = ""
    activation: str = "silu"


@dataclass(frozen=True)
class AddResidual:
    """HIDDEN += DELTA, where no norm follows that would add it."""


@dataclass(frozen=True)
class AllReduce:
    """Tensor parallelism: DELTA becomes its sum over all ranks."""


Operation = Norm | Matmul | RotateAndStore | Attention | ActivationMul | MixtureOfExperts | AddResidual | AllReduce
