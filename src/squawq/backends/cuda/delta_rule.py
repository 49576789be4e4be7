"""The gated delta rule on a GPU: whose the rows of a step are, and the launches of its kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from squawq.backends.base import States
from squawq.backends.cuda.delta_kernels import convolve_kernel, keep_kernel, norm_kernel, recur_kernel
from squawq.backends.cuda.int4 import INTERPRETED
from squawq.backends.cuda.launch import Sums, pdl
from squawq.backends.delta_rule import L2_EPS
from squawq.backends.layer_ops import GatedDeltaRule
from squawq.delta_config import DeltaRuleConfig

COLUMNS = 64 if INTERPRETED else 8  # of a state, in a program


@dataclass(frozen=True)
class Rows:
    """Whose the rows of a step are. All int64.

    Attributes:
        firsts, places, positions: [rows]: the first row of each row's sequence, the place of its state, its position,
            below 0 for padding.
        sequences: [sequences, 4]: first row, rows, position of the first row, place; None: every row is a sequence's
            only one.
    """

    firsts: Tensor
    places: Tensor
    positions: Tensor
    sequences: Tensor | None = None


@dataclass(frozen=True)
class Space:
    """Between the kernels, float32: queries, keys and values [rows, channels], and outputs [rows, values]."""

    mixed: Tensor
    found: Tensor


def space(rows: int, sizes: DeltaRuleConfig, device: torch.device) -> Space:
    return Space(torch.zeros(rows, sizes.channels, device=device), torch.zeros(rows, sizes.values, device=device))


def gated_delta_rule(
    wide: Sums, gates: Sums, rule: GatedDeltaRule, eps: float, of: Rows, states: States, between: Space, out: Tensor,
    dependent: bool = False,
) -> None:  # fmt: skip
    """See `layer_ops.GatedDeltaRule`: from the sums of both products into out [rows, values]."""
    sizes, (inputs, memory), rows = rule.sizes, states, len(of.positions)
    keys, values, key_dim, value_dim = sizes.key_heads, sizes.value_heads, sizes.key_dim, sizes.value_dim
    channels, total, alone = sizes.channels, sizes.channels + sizes.values, of.sequences is None
    none = of.positions
    sums = wide.parts, none if wide.bias is None else wide.bias
    split, biased = wide.parts.shape[0], wide.bias is not None
    width = triton.next_power_of_2(max(key_dim, value_dim))
    convolve_kernel[(rows, 2 * keys + values)](
        *sums, rule.convolution, inputs, of.firsts, of.places, of.positions, between.mixed, rows, key_dim**-0.5, L2_EPS,
        split, biased, keys, key_dim, value_dim, channels, total, sizes.kernel, alone, width, dependent,
        num_warps=1, **pdl(dependent),
    )  # fmt: skip
    if of.sequences is not None:
        keep_kernel[(len(of.sequences), triton.cdiv(channels, 256))](
            *sums, inputs, of.sequences, rows, split, biased, channels, total, sizes.kernel, 256, num_warps=2
        )
    count = rows if of.sequences is None else len(of.sequences)
    recur_kernel[(count, values, triton.cdiv(value_dim, COLUMNS))](
        between.mixed, gates.parts, none if gates.bias is None else gates.bias, rule.rate, rule.bias, memory,
        none if of.sequences is None else of.sequences, of.places, of.positions, between.found, rows,
        gates.parts.shape[0], gates.bias is not None, keys, values, key_dim, value_dim, alone,
        triton.next_power_of_2(key_dim), COLUMNS, dependent, num_warps=1, num_stages=3, **pdl(dependent),
    )  # fmt: skip
    norm_kernel[(rows, values)](
        between.found, *sums, rule.norm, out, rows, eps, split, biased, values, value_dim, channels, total,
        torch.finfo(out.dtype).max, triton.next_power_of_2(value_dim), dependent, num_warps=1, **pdl(dependent),
    )  # fmt: skip
