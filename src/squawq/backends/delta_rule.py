"""The gated delta rule of linear attention layers in plain torch, part by part: what the kernels of backends compute.

A sequence's outputs depend neither on how its tokens are cut into chunks nor on the rest of the batch: the recurrence
goes token by token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from squawq.backends.layer_ops import GatedDeltaRule
from squawq.delta_config import DeltaRuleConfig

L2_EPS = 1e-6  # of the norms of queries and keys


def convolve(x: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """SiLU of a causal convolution over the tokens of x [rows, channels], each channel with its own weights.

    Args:
        inputs: [kernel - 1, channels], the rows before x; those before the next x from now on.
        weight: [kernel, channels].
    """
    whole = torch.cat((inputs, x))
    inputs.copy_(whole[len(x) :])
    return F.silu(sum((w * whole[i : i + len(x)] for i, w in enumerate(weight)), torch.zeros_like(x)))


def split_delta(x: Tensor, sizes: DeltaRuleConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [rows, value_heads, dim], the first two with L2 norm 1, and queries by key_dim^-0.5.

    Neighbouring value heads share a query and key head.
    """
    keys = sizes.key_heads * sizes.key_dim
    q, k, v = torch.split(x, [keys, keys, sizes.values], 1)
    q, k = (t.view(len(x), sizes.key_heads, sizes.key_dim) for t in (q, k))
    q, k = (t * torch.rsqrt(t.pow(2).sum(-1, keepdim=True) + L2_EPS) for t in (q, k))
    share = sizes.value_heads // sizes.key_heads
    q, k = (t.repeat_interleave(share, 1) for t in (q * sizes.key_dim**-0.5, k))
    return q, k, v.view(len(x), sizes.value_heads, sizes.value_dim)


def delta_gates(gates: Tensor, rule: GatedDeltaRule) -> tuple[Tensor, Tensor]:
    """beta and decay, both within (0, 1), of gates [rows, 2 * value_heads]."""
    beta, decay = gates.chunk(2, 1)
    return beta.sigmoid(), (rule.rate * F.softplus(decay + rule.bias)).exp()


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, memory: Tensor) -> Tensor:
    """Yang et al., arXiv 2412.06464, one token after another. All float32.

    Args:
        q, k: [rows, heads, key_dim].
        v: [rows, heads, value_dim].
        beta, decay: [rows, heads].
        memory: [heads, key_dim, value_dim], changed in place.

    Returns:
        [rows, heads, value_dim].
    """
    y = torch.empty_like(v)
    for t in range(len(q)):
        memory *= decay[t, :, None, None]
        error = v[t] - (k[t, :, :, None] * memory).sum(1)
        memory += k[t, :, :, None] * (beta[t, :, None] * error)[:, None]
        y[t] = (q[t, :, :, None] * memory).sum(1)
    return y
