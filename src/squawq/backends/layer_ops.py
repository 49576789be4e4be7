"""Decoder layers as data: `nn/layers.py` builds a list of these operations from a family's row, and a backend runs it.

A family with norms after attention, another activation or experts is another list, not another loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor


class Packed:
    """A weight [out, in] and its bias, in the layout of the backend that packed it."""

    shape: tuple[int, int]


class Buffer(IntEnum):
    """What operations read and write, one row per token. csrc/layers.h has the same numbers."""

    HIDDEN = 0  # [rows, hidden_size]: the residual stream
    NORMED = 1  # [rows, hidden_size]: input of attention or MLP
    DELTA = 2  # [rows, hidden_size]: output of attention or MLP, to be added to HIDDEN
    WIDE = 3  # queries, keys and values; then gate and up
    NARROW = 4  # attention output; then the MLP's inner activations


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
    """Norm (if given, float32 [head_dim]) and rotate WIDE's queries and keys; write keys and values to the cache."""

    layer: int
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


@dataclass(frozen=True)
class Attention:
    """NARROW = causal attention of WIDE's queries over the cache. window: tokens that a query sees; None for all."""

    layer: int
    window: int | None = None


@dataclass(frozen=True)
class ActivationMul:
    """NARROW = activation(gate) * up, where WIDE is [gate, up]. activation: one of `reference.ACTIVATIONS`."""

    activation: str = "silu"


@dataclass(frozen=True)
class MixtureOfExperts:
    """DELTA = sum over the top_k experts of each row of NORMED of share * down(activation(gate) * up).

    Shares are the softmax of the router's logits [rows, experts] in float32; renormalize: the top_k shares sum to 1.
    gate_up, down: one weight per expert.
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


Operation = Norm | Matmul | RotateAndStore | Attention | ActivationMul | MixtureOfExperts | AddResidual
