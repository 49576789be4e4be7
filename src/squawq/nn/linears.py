"""Reads linears of a checkpoint, or parts of them, and has the backend pack them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from squawq.backends.base import Backend
from squawq.backends.layer_ops import Packed
from squawq.format.groupwise import PER_WORD
from squawq.format.layouts import Gemm, part_group
from squawq.format.reader import WHOLE, Checkpoint, Part

logger = logging.getLogger("squawq")


@dataclass(frozen=True)
class Linear:
    """A linear in a checkpoint, by its full name, and which (outputs, inputs) of it are loaded.

    rows: int64; outputs of the part that are wanted, in their order. None: all as they are.
    """

    name: str
    out: int
    in_: int
    part: Part = WHOLE
    rows: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the part."""
        (first, last, _), (start, stop, _) = self.part[0].indices(self.out), self.part[1].indices(self.in_)
        return last - first if self.rows is None else len(self.rows), stop - start

    @property
    def has_bias(self) -> bool:
        """Whether the part adds the bias: of parts with other inputs, only the first does."""
        return self.part[1].indices(self.in_)[0] == 0


def load_linear(
    checkpoint: Checkpoint, linears: Sequence[Linear], backend: Backend, *, ordered: bool = False
) -> Packed:
    """Linears with the same input, stacked to one weight.

    ordered: What runs the weight applies its `order` (`Matmul` does). Without, and where linears have different orders,
    they are dequantized.
    """
    quantized = [checkpoint.is_quantized(linear.name) for linear in linears]
    bias = _bias(checkpoint, linears, backend.device)
    whole = all(_in_words(linear.rows) for linear in linears)
    if all(quantized) and whole and (order := _common_order(checkpoint, linears, ordered)) is not False:
        gemms = (_gemm(checkpoint, linear) for linear in linears)
        first, inputs = linears[0], linears[0].shape[1]
        group = part_group(first.part[1], first.in_, checkpoint.group_of(first.in_))
        packed = backend.pack_int4(sum(linear.shape[0] for linear in linears), inputs, group, gemms, bias)
        packed.order = None if order is None else order.to(backend.device)
        return packed
    weights = [_dense(checkpoint, linear) for linear in linears]
    if any(quantized):  # a checkpoint with some of them quantized
        weights = [weight.float() for weight in weights]
    return backend.pack_dense(weights, bias)


def _common_order(checkpoint: Checkpoint, linears: Sequence[Linear], ordered: bool) -> Tensor | Literal[False] | None:
    """The activation order of linears with the same input, None for none; False if they cannot be stacked for it."""
    first, *others = [checkpoint.input_order(linear.name, linear.in_) for linear in linears]
    if first is None and all(other is None for other in others):
        return None
    if ordered and first is not None and all(other is not None and torch.equal(first, other) for other in others):
        return first
    names = ", ".join(linear.name for linear in linears)
    logger.warning("%s: dequantized, since activation orders (g_idx) differ or cannot be applied here", names)
    return False


def _in_words(rows: Tensor | None) -> bool:
    """Whether these outputs are whole words of a quantized weight: eights of neighbours."""
    if rows is None:
        return True
    if len(rows) % PER_WORD:
        return False
    first = rows[::PER_WORD, None] // PER_WORD * PER_WORD
    return bool((rows.view(-1, PER_WORD) == first + torch.arange(PER_WORD)).all())


def _gemm(checkpoint: Checkpoint, linear: Linear) -> Gemm:
    """With inputs in `Checkpoint.input_order`; `linear.rows` are whole words."""
    qweight, scales, qzeros = checkpoint.read_gemm(linear.name, linear.in_, linear.out, linear.part, ordered=True)
    if linear.rows is None:
        return qweight, scales, qzeros
    rows = linear.rows.to(scales.device)
    words = rows[::PER_WORD] // PER_WORD
    return qweight[:, words], scales[:, rows], None if qzeros is None else qzeros[:, words]


def _dense(checkpoint: Checkpoint, linear: Linear) -> Tensor:
    if checkpoint.is_quantized(linear.name):
        weight = checkpoint.read_weight(linear.name, linear.in_, linear.out, linear.part)
    else:
        weight = checkpoint.read_part(f"{linear.name}.weight", (linear.out, linear.in_), *linear.part)
    return weight if linear.rows is None else weight[linear.rows.to(weight.device)]


def _bias(checkpoint: Checkpoint, linears: Sequence[Linear], device: torch.device) -> Tensor | None:
    if not any(f"{linear.name}.bias" in checkpoint.tensors and linear.has_bias for linear in linears):
        return None
    biases = []
    for linear in linears:
        known, outputs = f"{linear.name}.bias" in checkpoint.tensors, linear.part[0]
        bias = checkpoint.read_part(f"{linear.name}.bias", (linear.out,), outputs) if known else None
        bias = bias if bias is None or linear.rows is None else bias[linear.rows.to(bias.device)]
        biases.append(torch.zeros(linear.shape[0]) if bias is None else bias.to(device, torch.float32))
    return torch.cat([bias.to(device) for bias in biases])
