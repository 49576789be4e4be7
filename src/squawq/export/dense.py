"""Dequantizes to dense 16-bit weights: (q - zero) * scale, rounded once to the checkpoint's dtype.

Knows one linear at a time, no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from squawq.errors import CheckpointError
from squawq.export.plan import Plan
from squawq.format.groupwise import GroupwiseTensor

SIXTEEN_BITS = {torch.float16: "float16", torch.bfloat16: "bfloat16"}

STACKED_ALONE = ("gpt_oss",)  # families whose experts transformers reads as one stack alone


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
