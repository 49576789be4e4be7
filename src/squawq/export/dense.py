"""Dequantizes to dense 16-bit weights: (q - zero) * scale, rounded once to the checkpoint's dtype.

Knows one linear at a time, and the experts of a layer where transformers reads them as one stack alone; no files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from squawq.errors import CheckpointError
from squawq.export.plan import Plan
from squawq.format.groupwise import GroupwiseTensor

SIXTEEN_BITS = {torch.float16: "float16", torch.bfloat16: "bfloat16"}

EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True)
class Stacks:
    """How transformers reads the experts of a layer, of which it does not read single ones.

    Attributes:
        names: Of the tensors beside the router: gate and up projections of all experts, and down projections.
        turned: Weights are [experts, in, out], not [experts, out, in].
        alternating: Gate and up take turns, row by row; else all of gate comes first.
    """

    names: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj")
    turned: bool = False
    alternating: bool = False


STACKS = {
    **dict.fromkeys(("gemma4_text", "granitemoe_swa", "qwen3_vl_moe_text"), Stacks()),
    "granitemoe": Stacks(("input_linear.weight", "output_linear.weight")),
    "llama4_text": Stacks(turned=True),
    "gpt_oss": Stacks(turned=True, alternating=True),
}


def stacked(tensors: Mapping[str, Tensor], spelling: tuple[str, str, str], stacks: Stacks) -> dict[str, Tensor]:
    """Tensors of a layer, single experts stacked: weights [out, in] and biases [out], by names of gate, up and down."""
    found: dict[tuple[str, str], dict[str, dict[int, Tensor]]] = {}
    result = {}
    for name, tensor in tensors.items():
        if (match := EXPERT.fullmatch(name)) is None:
            result[name] = tensor
            continue
        block, number, linear, kind = match.groups()
        found.setdefault((block, kind), {}).setdefault(linear, {})[int(number)] = tensor
    for (block, kind), linears in found.items():
        gate, up, down = (torch.stack([linears[name][i] for i in sorted(linears[name])]) for name in spelling)
        both = torch.stack((gate, up), 2).flatten(1, 2) if stacks.alternating else torch.cat((gate, up), 1)
        for name, stack in zip(stacks.names, (both, down), strict=True):
            turned = stack.mT if stacks.turned and kind == "weight" else stack
            result[f"{block}.{name}{'_bias' if kind == 'bias' else ''}"] = turned.contiguous()
    return result


@dataclass(frozen=True)
class Dense:
    """Turns linears into weights of `dtype`, one of SIXTEEN_BITS."""

    dtype: torch.dtype
    settings_file: None = None

    @classmethod
    def like(cls, dtype: torch.dtype) -> Dense:
        """In the dtype of a checkpoint's embedding; float16, as its scales, if that has not 16 bits."""
        return cls(dtype if dtype in SIXTEEN_BITS else torch.float16)

    def linear(self, name: str, tensor: GroupwiseTensor) -> dict[str, Tensor]:
        """weight [out, in]. Raises CheckpointError for weights that the dtype cannot hold."""
        weight = tensor.dequantize().to(self.dtype)
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"{name}: its scales give weights beyond {SIXTEEN_BITS[self.dtype]}")
        return {"weight": weight}

    def config(self, raw: dict[str, Any], plan: Plan) -> dict[str, Any]:  # noqa: ARG002
        """The new config.json, without quantization."""
        dropped = ("dtype", "torch_dtype", "quantization_config")
        return {**{k: v for k, v in raw.items() if k not in dropped}, "torch_dtype": SIXTEEN_BITS[self.dtype]}
