"""Reads linears of a checkpoint, or parts of them, and has the backend pack them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squawq.backends.base import Backend
from squawq.backends.layer_ops import Packed
from squawq.format.layouts import part_group
from squawq.format.reader import WHOLE, Checkpoint, Part


@dataclass(frozen=True)
class Linear:
    """A linear in a checkpoint, by its full name, and which (outputs, inputs) of it are loaded."""

    name: str
    out: int
    in_: int
    part: Part = WHOLE

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the part."""
        (first, last, _), (start, stop, _) = self.part[0].indices(self.out), self.part[1].indices(self.in_)
        return last - first, stop - start

    @property
    def has_bias(self) -> bool:
        """Whether the part adds the bias: of parts with other inputs, only the first does."""
        return self.part[1].indices(self.in_)[0] == 0


def load_linear(checkpoint: Checkpoint, linears: Sequence[Linear], backend: Backend) -> Packed:
    """Linears with the same input, stacked to one weight."""
    quantized = [checkpoint.is_quantized(linear.name) for linear in linears]
    bias = _bias(checkpoint, linears, backend.device)
    if all(quantized):
        gemms = (checkpoint.read_gemm(linear.name, linear.in_, linear.out, linear.part) for linear in linears)
        first, inputs = linears[0], linears[0].shape[1]
        group = part_group(first.part[1], first.in_, checkpoint.group_of(first.in_))
        return backend.pack_int4(sum(linear.shape[0] for linear in linears), inputs, group, gemms, bias)
    weights = [_dense(checkpoint, linear) for linear in linears]
    if any(quantized):  # a checkpoint with some of them quantized
        weights = [weight.float() for weight in weights]
    return backend.pack_dense(weights, bias)


def _dense(checkpoint: Checkpoint, linear: Linear) -> Tensor:
    if checkpoint.is_quantized(linear.name):
        return checkpoint.read_quantized(linear.name, linear.in_, linear.out, linear.part).dequantize()
    return checkpoint.read_part(f"{linear.name}.weight", (linear.out, linear.in_), *linear.part)


def _bias(checkpoint: Checkpoint, linears: Sequence[Linear], device: torch.device) -> Tensor | None:
    if not any(f"{linear.name}.bias" in checkpoint.tensors and linear.has_bias for linear in linears):
        return None
    biases = []
    for linear in linears:
        known, outputs = f"{linear.name}.bias" in checkpoint.tensors, linear.part[0]
        bias = checkpoint.read_part(f"{linear.name}.bias", (linear.out,), outputs) if known else None
        biases.append(torch.zeros(linear.shape[0]) if bias is None else bias.to(device, torch.float32))
    return torch.cat([bias.to(device) for bias in biases])
